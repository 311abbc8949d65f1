"""A progress bar that counts optimizer steps."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override


class StepsBar(RichProgressBar):
    """Lightning's progress bar, counting optimizer steps of ``max_steps``, so that the time left is right.

    Lightning's own bar counts micro-batches against a number of steps, which is wrong with accumulation, and counts a
    resumed run's steps against the remaining ones.
    """

    @property
    @override
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.is_enabled and trainer.max_steps > 0:  # a run resumed inside an epoch has no epoch start
            self._initialize_train_progress_bar_id()
            self._update(self.train_progress_bar_id, trainer.global_step)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.max_steps > 0:
            self._update(self.train_progress_bar_id, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step - 1 if trainer.max_steps > 0 else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return "Training" if self.trainer.max_steps > 0 else super()._get_train_description(current_epoch)
