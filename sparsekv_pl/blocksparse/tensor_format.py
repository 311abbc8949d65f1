"""File format for one layer's queries, keys and values of one sample, read by ``torch.load(weights_only=True)``.

A file is {"Q": (B, H, L, D), "K": (B, K, L, D), "V": (B, K, L, D), "metadata": ``Metadata``}, after RoPE, in the
model's compute dtype. Names are like tensors_seq4096_layer8_sample1_20240219_120000.pt.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from sparsekv_pl.storage.whole_files import written_whole

FIX = "collect it again (evaluate.py predict --config configs/analyze/collect.yaml), or remove the file"
KEYS = {"Q", "K", "V", "metadata"}


class Metadata(TypedDict):
    """A file's metadata, with exactly these keys."""

    layer_idx: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    """Size of the residual stream, which may differ from num_heads * head_dim."""
    batch_size: int
    timestamp: str
    """Start of the collection, YYYYMMDD_HHMMSS; shared by its files of one length."""
    model_path: str


class TensorFileError(ValueError):
    """An unusable file; the message has its name, the fault and the fix."""

    def __init__(self, path: Path, wrong: str, fix: str = FIX) -> None:
        self.path, self.wrong = path, wrong
        super().__init__(f"{path.name} {wrong}: {fix}")


@dataclass(frozen=True)
class LayerTensors:
    """One layer of one sample."""

    query: Tensor
    """(B, H, L, D), after RoPE."""
    key: Tensor
    """(B, K, L, D), after RoPE; H is a multiple of K."""
    value: Tensor
    """(B, K, L, D)."""
    metadata: Metadata


def file_name(metadata: Metadata, sample: int) -> str:
    """The name of a sample's file, as in tensors_seq4096_layer8_sample1_20240219_120000.pt."""
    place = f"seq{metadata['seq_len']}_layer{metadata['layer_idx']}_sample{sample}"
    return f"tensors_{place}_{metadata['timestamp']}.pt"


def write(folder: Path, sample: int, tensors: LayerTensors) -> Path:
    """Write one file in one step; return its path. ``folder`` must exist. Only the tensors' own elements are saved."""
    path = folder / file_name(tensors.metadata, sample)
    content = {
        "Q": _alone(tensors.query),
        "K": _alone(tensors.key),
        "V": _alone(tensors.value),
        "metadata": dict(tensors.metadata),
    }
    with written_whole(path) as partial, partial.open("wb") as file:  # given a path, torch hides the disk's error
        torch.save(content, file)
    return path


def read(path: Path) -> LayerTensors:
    """Read and check one file. The tensors are memory-mapped.

    Raises ``TensorFileError`` for a file that is truncated, is not a tensor file, or holds pickled code (which is not
    run); for keys, shapes, dtypes and metadata that contradict each other or the name; and for numbers that are not
    finite.
    """
    content = _loaded(path)
    wrong = _wrong_content(content) or _wrong_metadata(content["metadata"]) or _wrong_tensors(content)
    wrong = wrong or _wrong_name(path.name, content["metadata"])
    if wrong:
        raise TensorFileError(path, wrong)
    return LayerTensors(content["Q"], content["K"], content["V"], content["metadata"])


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise TensorFileError(path, "does not exist") from error
    except pickle.UnpicklingError as error:
        raise TensorFileError(
            path,
            "holds pickled objects other than tensors and plain values, and loading them would run their code; "
            "nothing was loaded",
            "do not trust its source, and " + FIX,
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:  # damaged files raise any of these
        raise TensorFileError(path, "is truncated, damaged, or not in torch.save's zip format") from error


def _alone(tensor: Tensor) -> Tensor:
    """A copy on the CPU, because torch.save writes the whole storage of a view."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _wrong_content(content: Any) -> str | None:
    if not isinstance(content, dict) or set(content) != KEYS:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        return f"holds {found} instead of {sorted(KEYS)}"
    for name in ("Q", "K", "V"):
        tensor = content[name]
        if not isinstance(tensor, Tensor) or tensor.ndim != 4 or not tensor.is_floating_point() or not tensor.numel():
            return f"has no tensor (batch, heads, tokens, dim) of floating-point numbers as {name}"
    return None


def _wrong_metadata(metadata: Any) -> str | None:
    fields = Metadata.__annotations__
    if not isinstance(metadata, dict) or set(metadata) != set(fields):
        found = sorted(map(str, metadata)) if isinstance(metadata, dict) else type(metadata).__name__
        return f"has the metadata {found} instead of {sorted(fields)}"
    for name, kind in fields.items():
        if type(metadata[name]) is not kind:  # True is an int, but not a number of heads
            return f"has the metadata {name}={metadata[name]!r}, which should be of type {kind.__name__}"
    return None


def _wrong_tensors(content: dict[str, Any]) -> str | None:
    metadata, query, key, value = content["metadata"], content["Q"], content["K"], content["V"]
    batch, length, dim = (metadata[name] for name in ("batch_size", "seq_len", "head_dim"))
    heads, kv_heads = metadata["num_heads"], metadata["num_kv_heads"]
    stated = {
        "Q": (batch, heads, length, dim),
        "K": (batch, kv_heads, length, dim),
        "V": (batch, kv_heads, length, dim),
    }
    for name, shape in stated.items():
        if tuple(content[name].shape) != shape:
            return f"holds {name} of shape {tuple(content[name].shape)}, but its metadata says {shape}"
    if heads % kv_heads:
        return f"has {heads} query heads, which {kv_heads} key/value heads cannot share evenly"
    if not query.dtype == key.dtype == value.dtype:
        return f"holds Q, K, V of different types {query.dtype}, {key.dtype}, {value.dtype}"
    if not all(bool(content[name].isfinite().all()) for name in stated):
        return "holds numbers that are infinite or NaN"
    return None


def _wrong_name(name: str, metadata: Metadata) -> str | None:
    """A fault of the name, or None. Only the name holds the sample's number."""
    sample = re.search(r"_sample(\d+)_", name)
    stated = file_name(metadata, int(sample[1]) if sample else 0)
    return None if sample and name == stated else f"has a name that contradicts its metadata ({stated})"
