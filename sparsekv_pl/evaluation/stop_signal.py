"""Delaying Ctrl-C and SIGTERM until the running step ends, and the exit codes that follow."""

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
    """A signal ended the run between two steps, after saving. The exit code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class HeldSignals:
    """Records signals instead of obeying them, until the holder of this object can stop.

    A second Ctrl-C raises KeyboardInterrupt at once; on the command line a second of either ends the process
    (second_signal.py).
    """

    def __init__(self) -> None:
        self.asked = 0
        """The highest number of a received signal; 0 for none. SIGTERM is above Ctrl-C and SIGUSR1."""
        self.before: dict[int, Any] = {}
        """Held signal -> its previous handler."""

    def hold(self, *numbers: int, doing: str = "", also: Callable[[int, FrameType | None], Any] | None = None) -> None:
        """From now on only record the signals ``numbers``. Does nothing outside the main thread.

        Parameters
        ----------
        numbers
            Signals to hold.
        doing
            What the run does before it stops; printed at the first of ``STOPS``.
        also
            A handler that is called at once as well.
        """

        def record(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.asked:
                raise KeyboardInterrupt
            if number in STOPS and self.asked not in STOPS and doing and not getattr(rank_zero_only, "rank", 0):
                line = f"{signal.Signals(number).name}: {doing}; a second one stops at once\n"
                os.write(2, line.encode())  # not print: the signal may have interrupted one
            self.asked = max(self.asked, number)
            if also is not None:
                also(number, frame)

        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self.before[number] = signal.signal(number, record)

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        """Whether any signal was received."""
        return self.asked > 0

    def stop(self) -> NoReturn:
        """End the run as Lightning does for the received signal."""
        raise SIGTERMException(128 + self.asked) if self.asked == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def stop_signal() -> Iterator[HeldSignals]:
    """Hold Ctrl-C and SIGTERM in the block, so that a chunk always runs to its end; yield the held signals."""
    held = HeldSignals()
    held.hold(*STOPS, doing="finishing the chunk and saving")
    try:
        yield held
    finally:
        held.release()
