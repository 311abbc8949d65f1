"""Atomic writes of files and folders: a path holds the whole content or the earlier one, even after a kill."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
BEFORE = f".before{PARTIAL}"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside ``path`` for a file or folder; it becomes ``path`` after all of it is on disk.

    The parent folder is made if missing, and files get the mode that the umask leaves, whoever wrote them. Two
    concurrent writers need a lock (own_folder.py). Raises ``OSError`` with ``path``, if the disk refuses, even where
    torch or safetensors wrap the error. As with any error, the partial content is deleted and the earlier ``path``
    stays.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _go_back(path)
        delete(partial)
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _open_to_umask(file)
            _sync(file)
        _put(partial, path)
    except BaseException as error:
        _undo(partial, path)
        refused = disk_error(error) if isinstance(error, Exception) else None
        if refused is None or refused.errno is None:
            raise
        about = str(refused.filename or partial)
        if not about.startswith(str(partial)):
            raise  # an error about another file, which it names
        raise OSError(refused.errno, refused.strerror or str(refused), str(path)) from error


def replace(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step; a failure leaves the earlier file intact and nothing beside it.

    Raises ``IsADirectoryError`` if ``path`` is a folder, which a file never replaces.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with written_whole(path) as partial:
        partial.write_bytes(data)


def mend(folder: Path) -> None:
    """Repair ``folder`` after a kill: restore half-replaced paths and delete half-written ones.

    The caller must hold the folder.
    """
    for before in folder.glob(f".*{BEFORE}"):
        _go_back(before.with_name(before.name.removeprefix(".").removesuffix(BEFORE)))
    for partial in folder.glob(f".*{PARTIAL}"):
        delete(partial)


def delete(path: Path) -> None:
    """Delete a file or a folder with its content; nothing if missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind ``error``, which torch and safetensors wrap in errors of their own; None if there is none."""
    if error is None or isinstance(error, OSError):
        return error
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return disk_error(error.__cause__ or error.__context__) or next(
        (
            found
            for failure, _ in getattr(error, "failures", {}).values()  # of torch.distributed.checkpoint, by rank
            if (found := disk_error(failure)) is not None
        ),
        None,
    )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of ``path``, which need not exist."""
    there = next((folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(there).free


def check_room(path: Path, needed: int, what: str) -> None:
    """Raise ``ValueError`` if the disk of ``path`` has fewer than ``needed`` free bytes.

    ``what`` begins the message, for example "the checkpoint takes".
    """
    free = free_bytes(path)
    if free < needed:
        raise ValueError(
            f"{path}: {what} {needed:,} bytes at least, {free:,} are free: make room, or give a place on another disk"
        )


def _put(partial: Path, path: Path) -> None:
    """Move ``partial`` to ``path``. An existing folder is first moved aside, as it cannot be replaced in one step."""
    before = _before(path)
    if path.is_dir() or (path.is_symlink() and partial.is_dir()):  # a folder cannot replace a link
        path.rename(before)
    partial.replace(path)
    _sync(path.parent)
    delete(before)


def _go_back(path: Path) -> None:
    """Restore the earlier ``path`` if its replacement was interrupted."""
    before = _before(path)
    if os.path.lexists(before) and not os.path.lexists(path):
        before.rename(path)
    delete(before)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}{BEFORE}")


def _open_to_umask(path: Path) -> None:
    """Give a file the mode of any new one: safetensors hides from a cluster's other users what it writes."""
    if path.is_file() and not path.is_symlink():
        mask = os.umask(0o077)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # SMB syncs no folders
            raise
    finally:
        os.close(handle)


def _undo(partial: Path, path: Path) -> None:
    """Delete ``partial`` and restore ``path``, ignoring errors: the writer's own error is the one to report."""
    try:
        delete(partial)
        _go_back(path)
    except OSError:
        return
