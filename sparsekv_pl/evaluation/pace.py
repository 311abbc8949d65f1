"""Progress and remaining time of work, as lines of a log."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, TextIO

from tqdm import tqdm

from sparsekv_pl.models.duration import duration

LINE_SECONDS = 30.0
"""Seconds between two lines about one piece of work; the first and the last are always printed."""
EARLY_SECONDS = 3.0
"""Seconds before which a line has no remaining time."""


class Pace:
    """Prints progress and remaining time of work of ``total`` units, in a line every ``LINE_SECONDS``.

    The remaining time follows the slower of two rates, of the whole work and of the last ``LINE_SECONDS``: what an
    earlier run has finished takes no time and must not promise that for the rest.

    Parameters
    ----------
    what
        Beginning of the line.
    units
        Name of the units, in the plural.
    total
        Units of the whole work; infinity if unknown.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, what: str, units: str, total: float) -> None:
        self.what, self.units, self.total = what, units, total
        self.started = self.clock()
        self.printed: float | None = None
        self.reports = deque([(self.started, 0.0)])
        """Time and units done, of one report before the last ``LINE_SECONDS`` and all since."""

    def reached(self, done: float, *more: str) -> None:
        """Report that ``done`` units are done (may be fractional); ``more`` is added to the line."""
        now = self.clock()
        while len(self.reports) > 1 and self.reports[1][0] <= now - LINE_SECONDS:
            self.reports.popleft()
        since, before = self.reports[0]
        slowest = max((now - self.started) / max(done, 1e-9), (now - since) / max(done - before, 1e-9))
        self.reports.append((now, done))
        if self.printed is not None and now - self.printed < LINE_SECONDS and done < self.total:
            return
        self.printed = now
        known = done > 0 and self.total < float("inf")
        of = f" of {self.total:g}" if known else ""
        to_go = known and done < self.total and now - self.started >= EARLY_SECONDS
        left = [f"{duration(slowest * (self.total - done))} left"] if to_go else []
        print(f"{self.what}: " + ", ".join([f"{int(done)}{of} {self.units}", *more, *left]), flush=True)


def ticking(what: str, units: str, total: int, silent: bool = False) -> Callable[[], None]:
    """A function to call after each of ``total`` units: it moves a bar in a terminal and prints lines elsewhere."""
    bar = tqdm(total=total, desc=what, disable=True if silent else None)  # None: where there is no terminal
    pace, done = Pace(what, units, total), 0

    def tick() -> None:
        nonlocal done
        done += 1
        bar.update()
        if bar.disable and not silent:
            pace.reached(done)
        if done == total:
            bar.close()

    return tick


class WithoutBars:
    """A text stream that drops libraries' progress bars: in a file, each state of a bar would be a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        """Write ``text`` unless it begins with a carriage return, or is the line end after such a text."""
        bar = text.startswith("\r") or (self._dropped and text == "\n")
        self._dropped = text.startswith("\r")
        return len(text) if bar else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def without_bars() -> Iterator[None]:
    """Drop progress bars in the block if standard error is not a terminal."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(WithoutBars(sys.stderr)):
        yield
