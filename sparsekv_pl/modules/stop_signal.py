"""Ctrl-C and SIGTERM that wait for the end of what is running, and the exit codes that follow."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal ended the run between two steps, with all that was done saved. The exit code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class HeldSignals:
    """Signals that are noted, not obeyed, until their holder comes to a good moment.

    A second Ctrl-C raises KeyboardInterrupt at once. Other signals may come as often as they like: process launchers
    and schedulers send SIGTERM to a process, to its parent and to their group.
    """

    def __init__(self) -> None:
        self.asked = 0
        """The highest number of a signal that came; 0 for none. SIGTERM is above Ctrl-C and SIGUSR1."""
        self.before: dict[int, Any] = {}
        """Held signal -> its handler before."""

    def hold(self, *numbers: int, also: Callable[[int, FrameType | None], Any] | None = None) -> None:
        """From now on only note ``numbers``, and call ``also`` at once. Does nothing outside the main thread."""

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.asked:
                raise KeyboardInterrupt
            self.asked = max(self.asked, number)
            if also is not None:
                also(number, frame)

        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self.before[number] = signal.signal(number, note)

    def release(self) -> None:
        """Give the signals back to the handlers they had."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        """Whether any signal came."""
        return self.asked > 0

    def stop(self) -> NoReturn:
        """End the run in Lightning's way for the signal that came."""
        raise SIGTERMException(128 + self.asked) if self.asked == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def stop_signal() -> Iterator[HeldSignals]:
    """Set by the first Ctrl-C or SIGTERM, so that a chunk is never left half run."""
    held = HeldSignals()
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Lightning's, which tells the processes that it started
    held.hold(signal.SIGINT)
    held.hold(signal.SIGTERM, also=on_sigterm if callable(on_sigterm) else None)
    try:
        yield held
    finally:
        held.release()
