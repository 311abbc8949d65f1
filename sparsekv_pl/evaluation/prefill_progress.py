"""A bar that says how much of a context is read, how fast, and how long the rest takes."""

import time
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsekv_pl.evaluation.pace import LINE_SECONDS
from sparsekv_pl.reporting.console import console


class PrefillProgress:
    """A bar in a terminal; elsewhere (a file, a batch system) a line every 30 seconds.

    Parameters
    ----------
    tokens, done
        Of the whole context, and of what was read before.
    """

    def __init__(self, tokens: int, done: int) -> None:
        self.tokens, self.first = tokens, done
        self.started = self.said = time.monotonic()
        self.console = console()
        self.bar = Progress(
            TextColumn("reading"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens, {task.fields[rate]:.0f}/s,"),
            TimeElapsedColumn(),
            TextColumn("so far, left:"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("reading", total=tokens, completed=done, rate=0.0)

    def __enter__(self) -> Self:
        self.bar.start()
        if self.first:
            self.console.print(f"going on after {self.first:,} of {self.tokens:,} tokens")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def reached(self, done: int) -> None:
        """``done`` tokens of the context are read."""
        now = time.monotonic()
        rate = (done - self.first) / (now - self.started)
        self.bar.update(self.task, completed=done, rate=rate)
        if not self.console.is_terminal and (now - self.said > LINE_SECONDS or done == self.tokens):
            self.said = now
            left = (self.tokens - done) / rate / 60
            self.console.print(f"{done:,} of {self.tokens:,} tokens read, {rate:.0f}/s, {left:.1f} minutes left")
