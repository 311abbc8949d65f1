"""How far work is and how long the rest takes, in lines of a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Between two lines about one piece of work; the first and the last are always said."""


def duration(seconds: float) -> str:
    """In the unit that a reader would choose: 50 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Pace:
    """Says how far work of ``total`` units is and how long the rest takes, in a line every ``LINE_SECONDS``.

    Parameters
    ----------
    what
        The line begins with it.
    units
        What is counted, in the plural.
    total
        Of the whole work; infinite where that is not known.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, what: str, units: str, total: float) -> None:
        self.what, self.units, self.total = what, units, total
        self.started = self.clock()
        self.said: float | None = None

    def reached(self, done: float, *more: str) -> None:
        """``done`` units are done, the last perhaps in part; ``more`` stands in the line too."""
        now = self.clock()
        if self.said is not None and now - self.said < LINE_SECONDS and done < self.total:
            return
        self.said = now
        known = done > 0 and self.total < float("inf")
        of = f" of {self.total:g}" if known else ""
        left = [f"{duration((now - self.started) / done * (self.total - done))} left"] if known else []
        print(f"{self.what}: " + ", ".join([f"{int(done)}{of} {self.units}", *more, *left]), flush=True)


def ticking(what: str, units: str, total: int, silent: bool = False) -> Callable[[], None]:
    """To be called as each of ``total`` units is done: moves a bar in a terminal, says lines elsewhere."""
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
    """A text stream without libraries' progress bars, which rewrite one line: in a file each state would be kept."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        """Drop what begins by going back to the start of a line, and the line's end after it."""
        bar = text.startswith("\r") or (self._dropped and text == "\n")
        self._dropped = text.startswith("\r")
        return len(text) if bar else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def without_bars() -> Iterator[None]:
    """In the block, where standard error is no terminal."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(WithoutBars(sys.stderr)):
        yield
