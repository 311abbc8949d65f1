"""Progress and remaining time of work, as lines of a log."""

import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from itertools import accumulate
from typing import Any, TextIO

from tqdm import tqdm

from sparsekv_pl.models.duration import duration

LINE_SECONDS = 30.0
"""Seconds between two lines about one piece of work; the first and the last are always printed."""
EARLY_SECONDS = 3.0
"""Seconds before which a line has no remaining time."""
SKIPPED = 0.02
"""Share of the usual time of a unit below which one was not worked at but found finished."""


class Pace:
    """Prints progress and remaining time of work of ``total`` units, in a line every ``LINE_SECONDS``.

    The remaining time follows the rate of what was worked at: what an earlier run has finished takes next to no time
    and must not promise that for the rest.

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
        self.reported = (self.started, 0.0)
        self.steps: list[tuple[float, float]] = []
        """Seconds and units between one report and the next."""

    def reached(self, done: float, *more: str) -> None:
        """Report that ``done`` units are done (may be fractional); ``more`` is added to the line."""
        now, (since, before) = self.clock(), self.reported
        if done > before:
            self.steps.append((now - since, done - before))
            self.reported = (now, done)
        if self.printed is not None and now - self.printed < LINE_SECONDS and done < self.total:
            return
        self.printed = now
        known = self.total < float("inf")
        of = f" of {self.total:g}" if known else ""
        to_go = known and 0 < done < self.total and now - self.started >= EARLY_SECONDS
        left = [f"{duration(self._unit_seconds() * (self.total - done))} left"] if to_go else []
        print(f"{self.what}: " + ", ".join([f"{int(done)}{of} {self.units}", *more, *left]), flush=True)

    def _unit_seconds(self) -> float:
        """Return the mean seconds of a unit, without the steps far faster than the pace of half of the time."""
        paces = sorted((seconds / units, seconds, units) for seconds, units in self.steps)
        spent = list(accumulate(seconds for _, seconds, _ in paces))
        usual = paces[bisect_left(spent, spent[-1] / 2)][0]
        worked = [(seconds, units) for pace, seconds, units in paces if pace >= SKIPPED * usual]
        return sum(seconds for seconds, _ in worked) / sum(units for _, units in worked)


class BatchShare:
    """How much of a batch is done, by time: the first of its pieces holds a prefill that the others share."""

    def __init__(self, now: float) -> None:
        self._began, self._first = now, 0.0

    def after(self, done: int, pieces: int, now: float) -> float:
        """Return the share after ``done`` of ``pieces`` pieces; 0 after the first, which says nothing of the others."""
        spent = now - self._began
        if done == 1:
            self._first = spent
            return 0.0
        whole = self._first + (spent - self._first) / (done - 1) * (pieces - 1)
        return spent / whole if whole else done / pieces


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
