"""A folder that one process at a time writes into. The kernel holds the locks: they end with a process, killed or not.

Locks are files (flock) that stay when they are free: to delete one would let two processes lock two files of one name.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sparsekv_pl.storage.user_errors import told

log = logging.getLogger(__name__)

DEEPEST = 300
"""Characters of the longest path below a run's folder."""


@contextmanager
def claimed(folder: Path, key: str, use: str) -> Iterator[None]:
    """Hold ``folder``, which is made, for this process's ``use`` (a training, a report) inside the block.

    Raises
    ------
    ValueError
        With ``key``, the folder and the fix: where another process has it for the same use, says which; and where the
        folder cannot be made or written.
    """
    try:
        _check_length(key, folder)
        for above in (*reversed(folder.absolute().parents), folder):  # pathlib's own way recurses
            above.mkdir(exist_ok=True)
        path = folder / f".{use}.lock"
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{key}={folder}: {_holder(path)} writes its {use} there: wait for it, or give another --name or folder"
        ) from None
    except OSError as error:
        raise ValueError(f"{key}={folder}: {told(error)}") from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield
    finally:
        lock.release()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` inside the block; wait for whoever has it, and say so after a second."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.warning("another process holds %s: waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_length(key: str, folder: Path) -> None:
    longest = os.pathconf("/", "PC_PATH_MAX")
    if len(os.fsencode(folder.absolute())) + DEEPEST > longest:
        raise ValueError(f"{key}={folder}: files in it would have paths of over {longest} bytes: give a shorter path")


def _holder(path: Path) -> str:
    """As it wrote itself down; it may be about to."""
    try:
        return path.read_text() or "another process"
    except OSError:
        return "another process"


__all__ = ["claimed", "locked"]
