"""A hook of our own between the pieces of one batch, which may take minutes each: progress, and signals to stop."""

from lightning.pytorch import LightningModule


def piece_done(module: LightningModule, done: int, pieces: int) -> None:
    """Tell callbacks that have ``on_piece_end`` that ``done`` of a batch's ``pieces`` are done and kept."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "on_piece_end"):
            callback.on_piece_end(done, pieces)
