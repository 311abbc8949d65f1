"""The second SIGTERM or Ctrl-C ends the process at once, with every process that it started.

The first one waits for the end of a step (stop_signal.py). Python runs signal handlers only between two of its own
instructions; a watching thread also receives signals while the main thread computes or waits for other ranks.
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
"""A SIGTERM this soon after the first is the same one: launchers signal both a process and its process group."""

_watching = False


@contextmanager
def second_stops_at_once() -> Iterator[None]:
    """Watch for signals in the block, unless another process started this rank: that process then ends it."""
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
    """Kill all descendants of this process, and exit with code 128 + ``number``."""
    os.write(2, f"{signal.Signals(number).name}: stopped at once\n".encode())
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(128 + number)


def _forget() -> None:
    """Stop watching in a forked process: its signals must not reach the parent's pipe."""
    if _watching:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
