"""Log the number of documents that could not be used, and of questions that could not be asked."""

from collections import deque
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from sparsekv_pl.models.batch import Batch


class SkippedDocuments(pl.Callback):
    """Log ``data/skipped_documents``: the documents that the training stream has skipped since the run began.

    With ``data.questions`` also ``data/left_out_questions/KIND``: how often a kind of question was drawn for a text
    that has nothing for it. They count all workers, ranks and epochs. The counts belong to the stream and resume with
    it; each batch carries its worker's. The first log waits for a batch of each worker.
    """

    def __init__(self) -> None:
        self._counts: deque[dict[str, int]] = deque()

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
        left_out = batch.get("left_out_questions", {})
        counts = {"data/skipped_documents": batch.get("skipped_documents", 0)}
        self._counts.append(counts | {f"data/left_out_questions/{kind}": count for kind, count in left_out.items()})
        due = trainer.global_step % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]
        if due and len(self._counts) == self._counts.maxlen:
            for name in self._counts[-1]:
                total = float(sum(of_worker[name] for of_worker in self._counts))
                pl_module.log(name, total, on_step=True, on_epoch=False, sync_dist=True, reduce_fx="sum")
