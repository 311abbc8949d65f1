"""The folder that a run writes to, and the hook that callbacks get between the pieces of one batch."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info


class RunOutput:
    """A folder; with ``trainer.fast_dev_run`` a temporary one in its place, deleted with this object."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._scratch: TemporaryDirectory[str] | None = None

    def of(self, trainer: Any) -> Path:
        """The folder for a run of ``trainer`` (None: not attached yet)."""
        if trainer is None or not trainer.fast_dev_run:
            return self.folder
        if self._scratch is None:
            self._scratch = TemporaryDirectory(prefix="fast_dev_run-")
            rank_zero_info(f"fast_dev_run: nothing is written to {self.folder}; a temporary folder is used instead")
        return Path(self._scratch.name)


def piece_done(module: LightningModule, done: int, pieces: int) -> None:
    """Call ``on_piece_end(done, pieces)`` of the callbacks that have it, after a piece's records are on disk."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "on_piece_end"):
            callback.on_piece_end(done, pieces)
