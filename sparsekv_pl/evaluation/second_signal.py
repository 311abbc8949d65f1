"""The second SIGTERM or Ctrl-C ends the process at once, with every process that it started.

The first one waits for the end of a step (stop_signal.py). Python runs signal handlers between two of its
instructions, so a thread watches: it is told of a signal also while the main thread computes, or waits for other ranks.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import psutil

STOPS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 0.5
"""A SIGTERM that soon after the first is the same: launchers send it to a process and to the group that it is in."""

_watching = False


@contextmanager
def second_stops_at_once() -> Iterator[None]:
    """Watch in the block. Ranks that another process started leave it to that process, which ends them."""
    global _watching
    if threading.current_thread() is not threading.main_thread() or "LOCAL_RANK" in os.environ:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watch.start()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")  # forked workers may hold the pipe open
        watch.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int) -> None:
    first: float | None = None
    while True:
        for number in os.read(reader, 64):
            if number == 0:
                return
            if number not in STOPS:
                continue
            if first is None:
                first = time.monotonic()
            elif number == signal.SIGINT or time.monotonic() - first > SAME_SECONDS:
                end_at_once(number)


def end_at_once(number: int) -> NoReturn:
    """Kill all that this process started, and leave with exit code 128 + ``number``."""
    os.write(2, f"{signal.Signals(number).name}: stopped at once\n".encode())
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(128 + number)


def _forget() -> None:
    """In a forked process: what it is told must not count as told to the one that forked it."""
    if _watching:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
