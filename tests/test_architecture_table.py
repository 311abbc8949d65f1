"""The page of architectures says what each can do here; its table is walked, on a tiny model of every row."""

import re
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.architecture_abilities import ABILITIES, NEAR, Differences, quantised
from tests.architectures import architecture

PAGE = Path(__file__).parents[1] / "docs/architectures.md"
REASONS = {
    "attention": "attention is computed here",
    "mask": "a mask of its own",
    "window": "window of 48 through which every layer",
}
"""Reason of a refusal on the page -> the pattern of its message."""


def table() -> dict[str, dict[str, str]]:
    """Model type -> column -> cell, of the page's first table."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[1].strip("`"): dict(zip(head[2:], row[2:], strict=True)) for row in body if row[1].startswith("`")}


TABLE = table()


def test_every_column_and_reason_of_the_page_is_known() -> None:
    assert TABLE
    explained = re.findall(r"^- \*\*(\w+)\*\*: ", PAGE.read_text().split("\n## ")[1], re.MULTILINE)
    given = {cell.removeprefix("refused: ") for row in TABLE.values() for cell in row.values() if ":" in cell}
    assert set(explained) == given == set(REASONS)
    for row in TABLE.values():
        assert list(row) == list(ABILITIES)


@pytest.mark.parametrize("name", TABLE)
def test_a_row_of_the_page_is_true(name: str, tmp_path: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = []
    for column, cell in TABLE[name].items():
        if cell == "not tried":
            continue
        expected = "yes" if cell == "yes" else REASONS[cell.removeprefix("refused: ")]
        differences, refusal = tried(name, column, tmp_path)
        assert refusal is None if expected == "yes" else re.search(expected, refusal or "yes"), (column, refusal)
        assert differences.loss < NEAR.loss, (column, differences)
        assert differences.gradients < (10 if column == "4-bit" else 1) * NEAR.gradients, (column, differences)
        found.append(f"{column} {cell}" if refusal else f"{column} {differences.loss:.0e} {differences.gradients:.0e}")
    print(f"{name}: {', '.join(found)}")


def tried(name: str, column: str, folder: Path) -> tuple[Differences, str | None]:
    """Try an ability; return its differences, or why the architecture is refused."""
    ability, model = ABILITIES[column], architecture(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kvpress warns of models that it was not tested with
        try:
            return (ability(model, folder) if ability is quantised else ability(model)), None
        except ValueError as error:
            return Differences(), str(error)
