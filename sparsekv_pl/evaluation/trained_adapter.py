"""Reading a trained adapter's folder: fingerprint, variants, and the summary of its training."""

from pathlib import Path
from typing import Any

from kvpress import BasePress

from sparsekv_pl.models.weight_match import TRAINING_SUMMARY
from sparsekv_pl.presses.nesting import press_name, presses_in
from sparsekv_pl.storage.fingerprint import folder_digest
from sparsekv_pl.storage.json_file import read_mapping


def fingerprint(adapter: str | None) -> str | None:
    """Digest of an adapter's weights and settings; it changes if the folder is trained again under the same name."""
    return None if adapter is None else folder_digest(Path(adapter).expanduser(), ["adapter_*"])


def variants_of(adapter: str | None) -> dict[str, str | None]:
    """Variant ("base", and "trained" with an adapter) -> fingerprint of its active adapter, None for base."""
    return {"base": None} if adapter is None else {"base": None, "trained": fingerprint(adapter)}


def training_summary(adapter: str | None) -> dict[str, Any]:
    """The adapter's training.json; empty if there is none.

    Raises ``ValueError`` for a damaged file.
    """
    path = None if adapter is None else Path(adapter).expanduser() / TRAINING_SUMMARY
    return read_mapping(path) if path is not None and path.exists() else {}


def seen_in_training(press: BasePress | None, summary: dict[str, Any]) -> bool:
    """Whether training evicted with ``press`` or with a press inside it: CriticalKV(SnapKV) is seen after SnapKV."""
    trained = summary.get("presses", [])
    return press is not None and any(press_name(inner) in trained for inner in presses_in(press))
