"""Printing to the terminal with rich, without markup: brackets in paths, names and errors are plain text."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDEST = 10_000
"""Width in columns when output goes to a file: nothing is folded or cut."""


def console(stderr: bool = False) -> Console:
    """Make a console without markup and emoji; in a file, lines are not wrapped."""
    made = Console(markup=False, emoji=False, stderr=stderr)
    wide = made.is_terminal or made.is_jupyter
    return made if wide else Console(markup=False, emoji=False, stderr=stderr, width=WIDEST)


def show(*shown: str | Table) -> None:
    """Print tables and texts; texts are not wrapped in a narrow terminal."""
    for one in shown:
        console().print(one, soft_wrap=isinstance(one, str))


def show_report(paths: Sequence[Path], loggers: Iterable[Any] = ()) -> None:
    """Print where a report lies, its page first, if it has files, and send its pictures to the run's loggers."""
    from sparsekv_pl.reporting.loggers import log_pictures

    log_pictures(loggers, paths)
    if not paths:
        return
    first, *others = sorted(paths, key=lambda path: path.suffix != ".html")
    pictures = sum(path.suffix == ".png" for path in others)
    beside = [path.name for path in others if path.suffix != ".png"] + [f"{pictures} pictures"] * bool(pictures)
    show(f"report: {first}" + f" (beside it: {', '.join(beside)})" * bool(beside))
