"""Log the number of documents that could not be used."""

from collections import deque
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from sparsekv_pl.models.batch import Batch


class SkippedDocuments(pl.Callback):
    """Log ``data/skipped_documents``: the documents that the training stream has skipped since the run began.

    It counts all workers, ranks and epochs. The count belongs to the stream and resumes with it; each batch carries its
    worker's count. The first log waits for a batch of each worker.
    """

    def __init__(self) -> None:
        self._counts: deque[int] = deque()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset to one count per worker of this rank."""
        loader: Any = trainer.train_dataloader
        self._counts = deque(maxlen=max(getattr(loader, "num_workers", 0), 1))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log at the trainer's logging interval."""
        self._counts.append(batch.get("skipped_documents", 0))
        due = trainer.global_step % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]
        if due and len(self._counts) == self._counts.maxlen:
            total = float(sum(self._counts))
            pl_module.log(
                "data/skipped_documents", total, on_step=True, on_epoch=False, sync_dist=True, reduce_fx="sum"
            )
