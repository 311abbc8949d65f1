"""What a run says on the terminal: text as it is, for a path, name or error in brackets is no markup of rich's."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> "Console":
    """A console that takes nothing in a text for a style, a link or an emoji."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def show(*shown: "str | Table") -> None:
    """Print tables, and texts of which a narrow terminal breaks no line."""
    for one in shown:
        console().print(one, soft_wrap=isinstance(one, str))


def show_report(paths: Iterable[Path]) -> None:
    """Print where the files of a report are."""
    show("report: " + ", ".join(map(str, paths)))
