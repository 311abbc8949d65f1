"""Where an evaluation may write: refused before anything is loaded, not after all the work."""

import os
from pathlib import Path

EXPORTED = ("adapter_config.json", "training.json", "model.safetensors", "model.safetensors.index.json")
RUN = ("checkpoints", "config.yaml")
"""One of these lies beside what a training exports."""


def check_output(key: str, output: str | Path) -> None:
    """Raise ``ValueError`` where a report cannot be written, or where a training run puts what it exports.

    A run that goes on replaces such a folder whole, and what else lies in it is gone.
    """
    folder = Path(output).expanduser()
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir():
        raise ValueError(f"{key}={output}: {there} is a file: give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={output}: {there} cannot be written: give another folder")
    place = folder.name in ("final", "merged") or folder.name.startswith("checkpoint-")
    if any((folder / name).exists() for name in EXPORTED) or (
        place and any((folder.parent / name).exists() for name in RUN)
    ):
        raise ValueError(f"{key}={output} is where a training exports to, and replaces all: give a folder of its own")


__all__ = ["check_output"]
