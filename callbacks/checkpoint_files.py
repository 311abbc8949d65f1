"""Checkpoint files: written atomically, checked without running code in them, and found by their step."""

import io
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sparsekv_pl.storage.whole_files import free_bytes, written_whole

SUFFIX = ".ckpt"
SHARDED = "meta.pt"
"""The file in a sharded checkpoint's folder with everything but tensors."""

METADATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
"""Module -> classes and functions allowed in a sharded checkpoint's metadata, besides torch's dtypes."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; nothing of it is left, and earlier checkpoints are unchanged."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoint files to a hidden name beside the target and rename them once they are on disk.

    Lightning's own CheckpointIO makes a second copy of everything in memory, writes it to the system's temporary folder
    and moves it from there; if that is another disk, the move is a copy, which can be interrupted.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with saved_whole(Path(path), checkpoint) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        if weights_only is False:
            raise ValueError("weights_only=false would run code that a checkpoint holds: leave it out")
        return super().load_checkpoint(path, map_location, weights_only=True)


@contextmanager
def saved_whole(path: Path, content: Any) -> Iterator[Path]:
    """Yield a partial path for a checkpoint or an export, renamed to ``path`` when complete: see ``written_whole``.

    Raises ``CheckpointError`` if writing fails: it names ``path``, the bytes that the tensors in ``content`` need, the
    free bytes, and the last readable checkpoint.
    """
    needed = sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor))
    try:
        with written_whole(path) as partial:
            yield partial
    except OSError as error:
        raise CheckpointError(not_saved(path, needed, error)) from error


def bytes_of(module: nn.Module, trained: bool = False) -> int:
    """Return the bytes of a module's weights, or of its ``trained`` weights alone."""
    return sum(
        value.numel() * value.element_size() for value in module.parameters() if value.requires_grad or not trained
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder or in its ``checkpoints`` folder."""
    return [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"checkpoints/*{SUFFIX}")]


def newest_readable(paths: Iterable[Path]) -> Path:
    """Return the readable checkpoint of the latest step; warn of each unreadable later one.

    Raises ``ValueError`` if none can be read.
    """
    tried = []
    for path in latest_first(paths):
        why = fault(path)
        if not why:
            return path
        tried.append(f"{path}: {why}")
        rank_zero_warn(f"checkpoint not used: {tried[-1]}")
    raise ValueError("no checkpoint can be read; start over without --ckpt_path. " + "; ".join(tried))


def chosen(path: Path) -> Path:
    """Resolve ``--ckpt_path``: a checkpoint, or the newest readable one in a run's folder.

    Raises ``ValueError`` if there is none, or none that can be read.
    """
    if re.match(r"\w+:/", str(path)):
        raise ValueError(f"--ckpt_path {path}: give a local file or folder, not an address")
    path = path.expanduser()
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"--ckpt_path {path}: there is no such file or folder")
    if path.is_dir() and not (path / SHARDED).exists():
        found = checkpoints_in(path)
        if not found:
            raise ValueError(f"--ckpt_path {path}: no {SUFFIX} in this folder or in checkpoints below it")
        return newest_readable(found)
    if why := fault(path):
        raise ValueError(
            f"--ckpt_path {path}: {why}; give another one, or the folder: then the newest readable is used"
        )
    return path


def fault(path: Path) -> str:
    """Return why a checkpoint cannot be loaded; empty if it can. All of it is read, no code in it is run."""
    try:
        if path.is_dir():
            _check_shards(path)
        _check_file(path / SHARDED if path.is_dir() else path)
    except pickle.UnpicklingError as error:
        return f"it holds objects whose code loading would run; it was not ({_first_line(error)})"
    except Exception as error:  # unpickling an arbitrary file can raise anything
        return f"it is truncated or corrupt ({_first_line(error)})"
    return ""


def _check_file(path: Path) -> None:
    with ZipFile(path) as archive:
        broken = archive.testzip()  # torch writes checksums but does not check them
    if broken:
        raise ValueError(f"checksum of {broken} does not match")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    keys = {"global_step"} if path.name == SHARDED else {"global_step", "state_dict", "optimizer_states"}
    if missing := sorted(keys - set(content if isinstance(content, dict) else ())):
        raise ValueError(f"no {missing[0]} in it: it is not from a training run")


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler of sharded checkpoints' ``.metadata``, which torch unpickles without a check.

    Looking a name up imports its module, which runs code: names that are not allowed in such a file are refused.
    """

    @override
    def find_class(self, module: str, name: str) -> Any:
        known = name in METADATA.get(module, ())
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check_shards(folder: Path) -> None:
    """Check that shards have the length in the metadata, and that pickled parts are plain data.

    torch loads both without a check.
    """
    with (folder / ".metadata").open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    for index, stored in metadata.storage_data.items():
        shard = folder / stored.relative_path
        if shard.stat().st_size < stored.offset + stored.length:
            raise ValueError(f"{shard.name} ends early")
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with shard.open("rb") as file:
                file.seek(stored.offset)
                torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)


def not_saved(path: Path, needed: int, error: OSError) -> str:
    """Make the one-line message of a failed write: cause, bytes needed (0: unknown) and free, last checkpoint."""
    what = f" {error.filename}" if error.filename and Path(error.filename) != path else ""
    saved = latest_first(checkpoints_in(path.parent))
    return (
        f"checkpoint {path} was not saved:{what} {error.strerror or error}. "
        f"{f'Its tensors need {needed:,} bytes; ' if needed else ''}{free_bytes(path):,} bytes are free. "
        f"Last good checkpoint: {next((last for last in saved if not fault(last)), 'none')}. "
        "Make room and resume with --ckpt_path last."
    )


def step_of(path: Path) -> int:
    """Return the optimizer step of a checkpoint, from the file or, if that cannot be read, its name; else -1."""
    try:
        content = torch.load(
            path / SHARDED if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True
        )
        return int(content["global_step"])
    except Exception:  # unpickling an arbitrary file can raise anything; ``fault`` reports it
        named = re.search(r"step=(\d+)", path.name)
        return int(named[1]) if named else -1


def latest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort checkpoints by step, latest first; within a step by name, last first."""
    return sorted(paths, key=lambda path: (step_of(path), path.name), reverse=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
