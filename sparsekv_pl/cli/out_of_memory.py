"""Explaining out-of-memory errors: the run's settings that can reduce memory, with their values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import ENOMEM
from typing import Any, NamedTuple

import torch

CPU_ALLOCATORS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of plain RuntimeErrors that mean out of memory: on Linux, on Windows, and in a GPU's matrix products."""


class OutOfMemoryError(RuntimeError):
    """The run needed more memory than there is."""


class Remedy(NamedTuple):
    """How to change a setting, and the values at which nothing more can be saved."""

    what: str
    spent: tuple[Any, ...] = ()
    training: bool = False
    """Whether it applies only to training."""


REMEDIES = {
    "batch_size": Remedy("fewer rows at once", spent=(1,)),
    "accumulate_grad_batches": Remedy("more, by as much as batch_size falls, to keep the step's size", training=True),
    "context_tokens": Remedy("shorter"),
    "continuation_tokens": Remedy("shorter"),
    "lengths": Remedy("shorter"),
    "chunk_tokens": Remedy("run the context in smaller chunks"),
    "budget": Remedy("keep fewer KV pairs"),
    "query_chunk": Remedy("fewer queries at once"),
    "checkpoint": Remedy("true recomputes activations", spent=(True,), training=True),
    "load_in_4bit": Remedy("true", spent=(True,)),
    "lora": Remedy("an adapter instead of every weight", spent=("given",), training=True),
    "dtype": Remedy("bfloat16, where the machine computes in it", spent=("bfloat16", "float16")),
    "precision": Remedy(
        "bf16-mixed, where the machine computes in it", spent=("bf16-mixed", "bf16-true", "16-mixed", "16-true")
    ),
    "placement": Remedy("{} spreads the weights over GPUs, CPU and disk", spent=("given",)),
    "sharded": Remedy("--config configs/train/fsdp.yaml shares the model out over GPUs", spent=(True,), training=True),
}
"""Setting's name, anywhere in the configuration -> its remedy."""


@contextmanager
def out_of_memory_explained(settings: Mapping[str, Any], training: bool) -> Iterator[None]:
    """Replace any out-of-memory error in the block by one that names the ``settings`` to change.

    Raises ``OutOfMemoryError`` in place of torch's and Python's errors.
    """
    try:
        yield
    except Exception as error:
        reason = next(filter(_is_out_of_memory, _causes(error)), None)
        if reason is None:
            raise
        remedies = "; ".join(_remedies(settings, training))
        raise OutOfMemoryError(f"out of memory ({_first_line(reason)}). What needs less: {remedies}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and its causes: jsonargparse turns any error in a constructor into a ValueError."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_ALLOCATORS)


def _first_line(error: BaseException) -> str:
    """The error's first line, without torch's advice on environment variables and its C++ frames."""
    message = str(error) or type(error).__name__
    return message.splitlines()[0].partition(" If reserved but unallocated")[0].rstrip(".")


def _remedies(settings: Mapping[str, Any], training: bool, path: str = "") -> Iterator[str]:
    """Yield ``key=value (what to do)`` for every setting that can reduce memory, with keys as on the command line."""
    for name, value in settings.items():
        key = path if name == "init_args" else f"{path}.{name}".removeprefix(".")
        remedy = REMEDIES.get(name)
        state = "given" if isinstance(value, Mapping) else value
        if remedy is not None and state not in remedy.spent and (training or not remedy.training):
            yield f"{key}={'null' if value is None else value} ({remedy.what})"
        elif isinstance(value, Mapping):
            yield from _remedies(value, training, key)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                yield from _remedies(item, training, f"{key}[{index}]")
