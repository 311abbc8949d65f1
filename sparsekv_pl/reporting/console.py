"""What a run says on the terminal: text as it is, for a path, name or error in brackets is no markup of rich's."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDEST = 10_000
"""Columns of a file: nothing is folded or cut."""


def console() -> "Console":
    """Takes nothing in a text for a style, a link or an emoji; in a file lines are as long as they are."""
    from rich.console import Console

    made = Console(markup=False, emoji=False)
    return made if made.is_terminal or made.is_jupyter else Console(markup=False, emoji=False, width=WIDEST)


def show(*shown: "str | Table") -> None:
    """Print tables, and texts of which a narrow terminal breaks no line."""
    for one in shown:
        console().print(one, soft_wrap=isinstance(one, str))


def show_report(paths: Sequence[Path], loggers: Iterable[Any] = ()) -> None:
    """Print where the files of a report are, and give its pictures to the run's loggers."""
    from sparsekv_pl.reporting.loggers import log_pictures

    log_pictures(loggers, paths)
    show("report: " + ", ".join(map(str, paths)))
