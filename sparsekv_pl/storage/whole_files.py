"""Files and folders that stand under their name whole or not at all, whatever stops the writer."""

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
    """Yield a hidden name beside ``path``, for a file or folder; it becomes ``path`` when all of it is on disk.

    The folder above is made. Whoever writes owns ``path``: two writers at once need a lock (own_folder.py).

    Raises
    ------
    OSError
        Where the disk refuses, with ``path`` in it, also where torch or safetensors hide it under errors of their own.
        What was written is deleted then, as at any error, and what ``path`` was stays.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _go_back(path)
        delete(partial)
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _sync(file)
        _put(partial, path)
    except BaseException as error:
        _undo(partial, path)
        refused = disk_error(error) if isinstance(error, Exception) else None
        if refused is None or refused.errno is None:
            raise
        about = str(refused.filename or partial)
        if not about.startswith(str(partial)):
            raise  # of another file, which is named
        raise OSError(refused.errno, refused.strerror or str(refused), str(path)) from error


def replace(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step; a failure leaves the earlier file whole and nothing beside it.

    A folder is never replaced by a file: ``IsADirectoryError``.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with written_whole(path) as partial:
        partial.write_bytes(data)


def mend(folder: Path) -> None:
    """Put in order what a killed process left in ``folder``, which the caller owns: half-written and half-replaced."""
    for before in folder.glob(f".*{BEFORE}"):
        _go_back(before.with_name(before.name.removeprefix(".").removesuffix(BEFORE)))
    for partial in folder.glob(f".*{PARTIAL}"):
        delete(partial)


def delete(path: Path) -> None:
    """A file, a folder with all in it, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def disk_error(error: BaseException | None) -> OSError | None:
    """The operating system's refusal behind ``error``: torch and safetensors hide it under errors of their own."""
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
    """On the disk that ``path`` is on, or will be."""
    there = next((folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(there).free


def check_room(path: Path, needed: int, what: str) -> None:
    """Raise ``ValueError`` where the disk of ``path`` has less than ``needed`` bytes, what ``what`` takes at least."""
    free = free_bytes(path)
    if free < needed:
        raise ValueError(
            f"{path}: {what} {needed:,} bytes at least, {free:,} are free: make room, or give a place on another disk"
        )


def _put(partial: Path, path: Path) -> None:
    """Under its name, in place of what had it: a folder cannot be replaced in one go."""
    before = _before(path)
    if path.is_dir() or (path.is_symlink() and partial.is_dir()):  # a folder cannot replace a link
        path.rename(before)
    partial.replace(path)
    _sync(path.parent)
    delete(before)


def _go_back(path: Path) -> None:
    """Take back what ``path`` was, where its replacement was stopped half-way."""
    before = _before(path)
    if os.path.lexists(before) and not os.path.lexists(path):
        before.rename(path)
    delete(before)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}{BEFORE}")


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
    """Delete ``partial`` and take back ``path``. Ignores refusals: the error that stopped the writer is raised."""
    try:
        delete(partial)
        _go_back(path)
    except OSError:
        return


__all__ = ["check_room", "delete", "disk_error", "free_bytes", "mend", "replace", "written_whole"]
