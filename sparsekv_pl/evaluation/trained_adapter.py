"""Reading a trained adapter's folder: fingerprint, variants, and whether its training saw a press."""

from pathlib import Path
from typing import Any

from kvpress import BasePress

from sparsekv_pl.models.training_summary import trainings
from sparsekv_pl.presses.nesting import press_name, presses_in
from sparsekv_pl.storage.fingerprint import folder_digest


def fingerprint(adapter: str | None) -> str | None:
    """Digest of an adapter's weights and settings; it changes if the folder is trained again under the same name."""
    return None if adapter is None else folder_digest(Path(adapter).expanduser(), ["adapter_*"])


def variants_of(adapter: str | None) -> dict[str, str | None]:
    """Variant ("base", and "trained" with an adapter) -> fingerprint of its active adapter, None for base."""
    return {"base": None} if adapter is None else {"base": None, "trained": fingerprint(adapter)}


def seen_in_training(press: BasePress | None, summary: dict[str, Any]) -> bool:
    """Whether training evicted with ``press`` or with a press inside it: CriticalKV(SnapKV) is seen after SnapKV.

    The trainings that an adapter was continued from count too.
    """
    trained = {name for training in trainings(summary) for name in training.get("presses", [])}
    return press is not None and any(press_name(inner) in trained for inner in presses_in(press))
