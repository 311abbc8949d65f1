"""End a test run at the first SIGTERM, with every process that it started.

Trainers in tests replace the handler of SIGTERM by one that waits for the end of a step. Python's wake-up descriptor
sees a signal whatever its handler is, so a thread that reads it decides.
"""

import os
import select
import signal
import threading
from types import FrameType

import psutil
import pytest

POLL_SECONDS = 1.0
"""How soon a worker sees that the process that started it is gone."""

_read, _write = os.pipe()
os.set_blocking(_write, False)


def pytest_configure(config: pytest.Config) -> None:
    """Watch for SIGTERM, and in a worker of pytest-xdist for the end of the process that started it."""
    signal.signal(signal.SIGTERM, _leave_it_to_the_thread)
    _listen()
    os.register_at_fork(after_in_child=_forget)
    parent = os.getppid() if hasattr(config, "workerinput") else None
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="termination").start()


def pytest_runtest_setup() -> None:
    """Listen again: event loops of earlier tests take the wake-up descriptor for themselves."""
    _listen()


def _listen() -> None:
    signal.set_wakeup_fd(_write, warn_on_full_buffer=False)


def _forget() -> None:
    """Give a forked child, such as a worker of a data loader, the default handler and no share in the descriptor."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Stand in for the default handler, under which Python would see nothing."""


def _watch(parent: int | None) -> None:
    while parent in (None, os.getppid()):
        ready, _, _ = select.select([_read], [], [], POLL_SECONDS)
        if ready and signal.SIGTERM in os.read(_read, 512):
            break
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(128 + signal.SIGTERM)
