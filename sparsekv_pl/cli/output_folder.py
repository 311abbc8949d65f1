"""Where an evaluation may not write: refused before anything is loaded, not after all the work."""

from pathlib import Path

EXPORTED = ("adapter_config.json", "training.json", "model.safetensors", "model.safetensors.index.json")
RUN = ("checkpoints", "config.yaml")
"""One of these lies beside what a training exports."""


def check_output(key: str, output: str | Path) -> None:
    """Raise ``ValueError`` where a training run puts what it exports.

    A run that goes on replaces such a folder whole, and what else lies in it is gone.
    """
    folder = Path(output).expanduser()
    place = folder.name in ("final", "merged") or folder.name.startswith("checkpoint-")
    if any(_there(folder / name) for name in EXPORTED) or (place and any(_there(folder.parent / name) for name in RUN)):
        raise ValueError(f"{key}={output} is where a training exports to, and replaces all: give a folder of its own")


def _there(path: Path) -> bool:
    """Whether it exists; what has too long a name does not."""
    try:
        return path.exists()
    except OSError:
        return False


__all__ = ["check_output"]
