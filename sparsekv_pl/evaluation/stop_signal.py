"""Ctrl-C and SIGTERM that wait for the end of what is running, and the exit codes that follow."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sparsekv_pl.evaluation.second_signal import STOPS


class Stopped(SystemExit):
    """A signal ended the run between two steps, with all that was done saved. The exit code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class HeldSignals:
    """Signals that are noted, not obeyed, until their holder comes to a good moment.

    A second Ctrl-C raises KeyboardInterrupt at once; on the command line a second of either ends the process
    (second_signal.py).
    """

    def __init__(self) -> None:
        self.asked = 0
        """The highest number of a signal that came; 0 for none. SIGTERM is above Ctrl-C and SIGUSR1."""
        self.before: dict[int, Any] = {}
        """Held signal -> its handler before."""

    def hold(self, *numbers: int, doing: str = "", also: Callable[[int, FrameType | None], Any] | None = None) -> None:
        """From now on only note ``numbers``, and call ``also`` at once. Does nothing outside the main thread.

        The first of ``STOPS`` says what is being done until it is obeyed.
        """

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.asked:
                raise KeyboardInterrupt
            if number in STOPS and self.asked not in STOPS and doing and not getattr(rank_zero_only, "rank", 0):
                line = f"{signal.Signals(number).name}: {doing}; a second one stops at once\n"
                os.write(2, line.encode())  # whatever is half printed is not entered again
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
    held.hold(*STOPS, doing="finishing the chunk and saving")
    try:
        yield held
    finally:
        held.release()
