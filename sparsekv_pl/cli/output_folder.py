"""Folders that an evaluation may not write to, refused before anything is loaded."""

from pathlib import Path

EXPORTED = ("adapter_config.json", "training.json", "model.safetensors", "model.safetensors.index.json")
RUN = ("checkpoints", "config.yaml")
"""At least one of these lies beside a training's exports."""


def check_output(key: str, output: str | Path) -> None:
    """Raise ``ValueError`` if ``output`` is a folder of a training's exports.

    A training that continues replaces such a folder as a whole; a report in it would be lost.
    """
    folder = Path(output).expanduser()
    place = folder.name in ("final", "merged") or folder.name.startswith("checkpoint-")
    if any(_there(folder / name) for name in EXPORTED) or (place and any(_there(folder.parent / name) for name in RUN)):
        raise ValueError(f"{key}={output} is where a training exports to, and replaces all: give a folder of its own")


def _there(path: Path) -> bool:
    """Whether ``path`` exists; a name that is too long does not."""
    try:
        return path.exists()
    except OSError:
        return False
