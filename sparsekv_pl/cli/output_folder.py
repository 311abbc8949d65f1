"""Folders that an evaluation may not write to, refused before anything is loaded."""

from pathlib import Path

from sparsekv_pl.storage.given_paths import existing

EXPORTED = ("adapter_config.json", "training.json", "model.safetensors", "model.safetensors.index.json")
RUN = ("checkpoints", "config.yaml")
"""At least one of these lies beside a training's exports."""


def check_output(key: str, output: str | Path) -> None:
    """Raise ``ValueError`` if ``output`` is a folder of a training's exports.

    A training that continues replaces such a folder as a whole; a report in it would be lost.
    """
    folder = Path(output).expanduser()
    place = folder.name in ("final", "merged") or folder.name.startswith("checkpoint-")
    beside = [folder.parent / name for name in RUN] if place else []
    if any(map(existing, [*(folder / name for name in EXPORTED), *beside])):
        raise ValueError(f"{key}={output} is where a training exports to, and replaces all: give a folder of its own")
