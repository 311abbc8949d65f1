"""Retry reads that stall or fail, with increasing waits and a limit."""

import logging
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from threading import Thread
from time import sleep
from traceback import walk_stack, walk_tb
from types import FrameType
from typing import TypeVar

from data.documents import SourceFailed

log = logging.getLogger(__name__)
T = TypeVar("T")


class Stalled(TimeoutError):
    """A read timed out. ``shard`` is the file that was being read, if known."""

    def __init__(self, seconds: float, shard: str | None) -> None:
        super().__init__(f"nothing came for {seconds:g} s")
        self.shard = shard


@dataclass(frozen=True)
class Retries:
    """Retries of a source that stalls, drops the connection or returns garbage; it is opened again each time.

    This is the outer layer: within one try, datasets and huggingface_hub retry single requests themselves. Raises
    ``ValueError`` for a setting out of range.

    Parameters
    ----------
    limit
        Retries of one read after the first try. A success resets the count.
    first_wait, longest_wait
        Seconds before the first retry, and the longest wait; the wait doubles every time.
    timeout_seconds
        Seconds after which a read counts as stalled. A read is one block of documents, including opening the stream if
        necessary.
    """

    limit: int = 5
    first_wait: float = 1.0
    longest_wait: float = 60.0
    timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        least = {"limit": 0, "first_wait": 0, "longest_wait": self.first_wait}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"retries.{name} is {getattr(self, name)}: give at least {bound}")
        if not self.timeout_seconds > 0:
            raise ValueError(f"retries.timeout_seconds is {self.timeout_seconds}: give more than 0 seconds")

    def call(self, read: Callable[[bool], T], source: str) -> T:
        """Return the result of ``read(first)``; ``first`` is False for retries.

        Errors of local files are not retried, except for stalls. Raises ``SourceFailed`` with the source, the shard if
        known, the number of tries and the last cause.
        """
        for tries in count(1):
            try:
                return in_time(self.timeout_seconds, lambda first=tries == 1: read(first))  # type: ignore[misc]
            except Exception as error:
                shard = error.shard if isinstance(error, Stalled) else file_read(walk_tb(error.__traceback__))
                what = f"{source}{f', shard {shard}' if shard else ''}"
                if tries > self.limit or not _is_transient(error, shard):
                    raise SourceFailed(
                        f"{what}: not readable in {tries} {'try' if tries == 1 else 'tries'} "
                        f"({causes(error)}). Repair it, or wait until the source is available, and resume: "
                        "the checkpoint continues from this place"
                    ) from error
                wait = min(self.first_wait * 2 ** (tries - 1), self.longest_wait)
                log.warning("%s: %s. Opening it again in %g s", what, causes(error), wait)
            sleep(wait)
        raise AssertionError("count() has no end")


def in_time(seconds: float, work: Callable[[], T]) -> T:
    """Return the result of ``work``, or raise ``Stalled`` after ``seconds``; its thread is then abandoned.

    It runs in a thread because socket timeouts do not end a read that trickles or hangs in a file system.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=run, name="text source", daemon=True)
    thread.start()
    thread.join(seconds)
    if not future.done():
        assert thread.ident is not None
        raise Stalled(seconds, file_read(walk_stack(sys._current_frames().get(thread.ident))))
    return future.result()


def file_read(frames: Iterable[tuple[FrameType, int]]) -> str | None:
    """Return the file that a builder of datasets was reading, from its local variable ``file``; None if unknown.

    The state of a stream that reads ahead is not the place of the error.
    """
    for frame, _ in frames:
        file = frame.f_locals.get("file")
        if frame.f_globals.get("__name__", "").startswith("datasets.packaged_modules.") and isinstance(file, str):
            return file
    return None


def causes(error: BaseException | None) -> str:
    """Describe an error and the two before it: fsspec reports every HTTP failure as a missing file."""
    found: list[str] = []
    while error is not None and len(found) < 3:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__context__
    return ", after ".join(found)


def _is_transient(error: Exception, shard: str | None) -> bool:
    missing = str(error) if isinstance(error, FileNotFoundError) else None
    place = (shard or missing or "unknown://").split("::")[-1]  # gzip://name::address
    return isinstance(error, TimeoutError) or "://" in place
