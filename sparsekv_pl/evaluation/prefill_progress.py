"""Progress of a long prefill: tokens read, speed and remaining time."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsekv_pl.evaluation.pace import LINE_SECONDS, duration
from sparsekv_pl.reporting.console import console


class PrefillProgress:
    """A bar in a terminal; elsewhere (a file, a batch system) a line every 30 seconds.

    Parameters
    ----------
    tokens, done
        Tokens of the whole context, and those already read.
    to
        The console to print to; None for stdout.
    """

    def __init__(self, tokens: int, done: int, to: Console | None = None) -> None:
        self.tokens, self.first = tokens, done
        self.started = self.printed = time.monotonic()
        self.console = to or console()
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
            self.console.print(f"continuing after {self.first:,} of {self.tokens:,} tokens")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def reached(self, done: int) -> None:
        """Show that ``done`` tokens of the context are read."""
        now = time.monotonic()
        rate = (done - self.first) / (now - self.started)
        self.bar.update(self.task, completed=done, rate=rate)
        if not self.console.is_terminal and (now - self.printed > LINE_SECONDS or done == self.tokens):
            self.printed = now
            left = f", {duration((self.tokens - done) / rate)} left" if done < self.tokens else ""
            self.console.print(f"{done:,} of {self.tokens:,} tokens read, {rate:.0f}/s{left}")
