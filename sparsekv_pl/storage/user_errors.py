"""One-line messages for errors that a user can fix."""

import errno
import logging
import os

from yaml import YAMLError

REMEDIES = {
    errno.ENOENT: "give a path that exists",
    errno.ENOTDIR: "a file stands where a folder should be: give another path",
    errno.EEXIST: "a file stands where a folder should be: give another path",
    errno.EISDIR: "a folder stands where a file should be: give another path",
    errno.EACCES: "give one that this user may read and write",
    errno.EPERM: "give one that this user may read and write",
    errno.EROFS: "give a place that can be written",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOSPC: "make room, or give a place on another disk",
    errno.EDQUOT: "make room, or give a place on another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or give a place on another disk",
}
OURS = ("sparsekv_pl", "callbacks", "data")


def user_message(error: BaseException) -> str | None:
    """The message of an error that a user can fix; None for a bug, which needs its traceback."""
    # Imported late: it brings pandas and matplotlib, which writing a file does not need.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, OSError):
        return _of_system(error)
    unknown_metric = str(error).startswith("Early stopping conditioned on metric")  # a RuntimeError of Lightning's
    if isinstance(error, (ValueError, MisconfigurationException, YAMLError)) or unknown_metric:
        return str(error)
    return str(error) if type(error).__module__.partition(".")[0] in OURS else None


def log_failure(log: logging.Logger, what: str, error: Exception) -> None:
    """Log that ``what`` failed: in one line for an error that a user can fix, otherwise with the traceback."""
    line = user_message(error)
    log.error("%s failed, the others go on: %s", what, line or "a mistake in the program", exc_info=line is None)


def _of_system(error: OSError) -> str:
    """File, error and fix; the own message of an OSError of a hub or a connection."""
    if error.errno is None:
        return str(error) or type(error).__name__
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join(
        filter(None, [" -> ".join(files), error.strerror or os.strerror(error.errno), REMEDIES.get(error.errno)])
    )
