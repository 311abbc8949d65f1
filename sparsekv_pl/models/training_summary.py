"""training.json: how an exported adapter or model was trained, and what that was continued from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekv_pl.storage.json_file import read_mapping

TRAINING_SUMMARY = "training.json"
"""File that callbacks/adapter_export.py writes beside an exported adapter."""
CONTINUED = "continued_from"
"""Key of the summary of the adapter that a training started from."""
AVERAGED, WEIGHT = "averaged", "weight"
"""Key of the summaries of the adapters that an average was made of, and the key of its weight in each of them."""


def training_summary(adapter: str | Path | None) -> dict[str, Any]:
    """The adapter's training.json; empty if there is none.

    Raises ``ValueError`` for a damaged file.
    """
    path = None if adapter is None else Path(adapter).expanduser() / TRAINING_SUMMARY
    return read_mapping(path) if path is not None and path.exists() else {}


def trainings(summary: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the training or average that ``summary`` describes, then what it was continued from or made of."""
    if summary:
        yield summary
        for earlier in (summary.get(CONTINUED, {}), *summary.get(AVERAGED, [])):
            yield from trainings(earlier)
