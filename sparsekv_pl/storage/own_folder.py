"""A folder that one process at a time writes to. Locks are the kernel's (flock) and end with the process, even killed.

Lock files stay after use: deleting one would let two processes lock two files of the same name.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from sparsekv_pl.storage.user_errors import user_message

log = logging.getLogger(__name__)

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of disks without locks: Lustre mounted without flock, NFS without lockd."""
DEEPEST = 300
"""Length in characters of the longest path below a run's folder."""


@contextmanager
def claimed(folder: Path, key: str, use: str) -> Iterator[None]:
    """Hold ``folder`` for this process's ``use`` ("training", "report") in the block; make it if missing.

    Raises ``ValueError`` with ``key``, the folder and the fix: if another process, which is named, holds it for the
    same use, or if the folder cannot be made or written.
    """
    try:
        _check_length(key, folder)
        for above in (*reversed(folder.absolute().parents), folder):  # pathlib's own parents=True recurses
            above.mkdir(exist_ok=True)
        path = folder / f".{use}.lock"
        lock = _lock(path)
        _acquire(lock, 0)
    except Timeout:
        raise ValueError(
            f"{key}={folder}: {_holder(path)} writes its {use} there: wait for it, or give another --name or folder"
        ) from None
    except OSError as error:
        raise ValueError(f"{key}={folder}: {user_message(error)}") from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield
    finally:
        lock.release()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` in the block; wait for another holder, with a warning after a second."""
    lock = _lock(path)
    try:
        _acquire(lock, 1)
    except Timeout:
        log.warning("another process holds %s: waiting for it", path)
        _acquire(lock, -1)
    try:
        yield
    finally:
        lock.release()


def _lock(path: Path) -> FileLock:
    return FileLock(path, fallback_to_soft=False)  # the soft one stays locked after a kill


def _acquire(lock: FileLock, seconds: float) -> None:
    """Wait so long (-1: for ever); on a disk without locks say so and go on."""
    try:
        lock.acquire(timeout=seconds)
    except OSError as error:  # a Timeout too
        if error.errno not in WITHOUT_LOCKS:
            raise
        _warn_once(Path(lock.lock_file).parent, os.strerror(error.errno))


@cache
def _warn_once(folder: Path, why: str) -> None:
    log.warning("%s is on a disk without locks (%s): see that one run at a time writes there", folder, why)


def _check_length(key: str, folder: Path) -> None:
    longest = os.pathconf("/", "PC_PATH_MAX")
    if len(os.fsencode(folder.absolute())) + DEEPEST > longest:
        raise ValueError(f"{key}={folder}: files in it would have paths of over {longest} bytes: give a shorter path")


def _holder(path: Path) -> str:
    """The holder's description of itself, which it may not have written yet."""
    try:
        return path.read_text() or "another process"
    except OSError:
        return "another process"
