"""A kept context as one safetensors file: tensors, and JSON that says what made them. Reading it runs no code."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekv_pl.eviction.interrupted_prefill import checksum_of
from sparsekv_pl.storage.whole_files import check_room, written_whole
from sparsekv_pl.usage.cache_origin import CacheOrigin
from sparsekv_pl.usage.kept_context import LAYERS, KeptContext
from sparsekv_pl.usage.loaded_model import ModelIdentity

ABOUT = "sparsekv_pl"
"""The key of the file's metadata that holds the JSON."""
FORMAT = 1
SUFFIX = ".safetensors"
TOKENS = "token_ids"


def write_cache(path: Path, model: ModelIdentity, origin: CacheOrigin, kept: KeptContext) -> None:
    """Write the file whole or not at all.

    Raises ``ValueError`` for a path with another suffix, and ``OSError`` if the disk refuses.
    """
    check_suffix(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.tensors.items()}
    tensors[TOKENS] = kept.ids.to(torch.int32)
    check_room(path, sum(tensor.nbytes for tensor in tensors.values()), "the cache takes")
    about = {
        "format": FORMAT,
        "model": asdict(model),
        "eviction": asdict(origin),
        "bounds": [list(bound) for bound in kept.bounds],
        "next_position": kept.next_position,
        "tokens": kept.tokens,
        "tokens_sha256": kept.tokens_sha256,
        "kept_pairs": kept.kept_pairs,
        "evicted_layers": list(kept.evicted),
        "kv_bytes": kept.kv_bytes,
        "checksum": checksum_of(tensors),
    }
    with written_whole(path) as partial:
        save_file(tensors, partial, metadata={ABOUT: json.dumps(about)})


def made_by(path: Path) -> tuple[ModelIdentity, CacheOrigin]:
    """Return the model and the eviction that made a file, without reading its tensors; see ``read_cache``."""
    with _damage_named(path):
        about = _about(path)
        return ModelIdentity(**about["model"]), CacheOrigin.read(about["eviction"])


def read_cache(path: Path) -> tuple[ModelIdentity, CacheOrigin, KeptContext]:
    """Read a file that ``write_cache`` wrote; tensors are on the host.

    Raises
    ------
    ValueError
        For a file that is missing, damaged, or no cache of this format.
    """
    with _damage_named(path):
        about = _about(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        if about["checksum"] != checksum_of(tensors):
            raise KeyError("its checksum is another")
        origin = CacheOrigin.read(about["eviction"])
        return ModelIdentity(**about["model"]), origin, replace(_kept(about, tensors), quantisation=origin.quantisation)


def _about(path: Path) -> dict[str, Any]:
    check_suffix(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file: give one that ContextCache.save wrote")
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
    if not isinstance(about, dict) or "format" not in about:
        raise ValueError(f"{path} holds no cache: give a file that ContextCache.save wrote")
    if about["format"] != FORMAT:
        raise ValueError(
            f"{path} has the format {about['format']!r}, and this version reads {FORMAT}: prefill the document again"
        )
    return about


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn the various errors of a damaged file into a ``ValueError``."""
    try:
        yield
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is damaged ({error}): prefill the document again") from error


def check_suffix(path: Path) -> None:
    """Raise ``ValueError`` for a name by which a cache would not be recognised."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: a cache is a {SUFFIX} file: give {path.name}{SUFFIX}")


def _kept(about: dict[str, Any], tensors: dict[str, Tensor]) -> KeptContext:
    ids = tensors.pop(TOKENS).long()
    unknown = [name for name in tensors if name.partition(".")[0] not in LAYERS]
    bounds = tuple((int(start), int(stop)) for start, stop in about["bounds"])
    evicted = tuple(about.get("evicted_layers", ()))
    kept = KeptContext(ids, bounds, int(about["next_position"]), tensors, evicted=evicted)
    if unknown or kept.tokens_sha256 != about["tokens_sha256"] or bounds[-1][1] != kept.tokens:
        raise KeyError(f"its tokens are not those that it names {unknown}")
    return kept
