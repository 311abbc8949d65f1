"""Set each training step's compression ratio from a schedule, and save the schedule's state in checkpoints."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from sparsekv_pl.schedules import Schedule


class Curriculum(pl.Callback):
    """Set the training module's ``compression_ratio`` before every batch, and log it.

    All micro-batches of one optimizer step get the same ratio. Validation's ratio is the module's own setting.

    Parameters
    ----------
    schedule
        The curriculum: ratio by optimizer step. Its shares of the run follow the trainer's ``max_steps``.
    monitor
        The metric that an adaptive schedule observes once per validation (not in the sanity check): perplexity under
        eviction. Pure schedules do not use it. Every rank takes rank 0's value, so that their ratios stay equal.

    Logs
    ----
    curriculum/compression_ratio
        The fraction of KV pairs removed at this step.
    """

    def __init__(self, schedule: Schedule, monitor: str = "val/perplexity_evicted") -> None:
        self.schedule = schedule
        self.monitor = monitor

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise ``ValueError`` before training if the curriculum would have no effect or no metric."""
        if stage != TrainerFn.FITTING:
            return
        if self.schedule.observes and not trainer.enable_validation:
            raise ValueError(
                f"{type(self.schedule).__name__} adapts to {self.monitor!r}, but this run has no validation: "
                f"give it validation data and limit_val_batches above 0, or choose a schedule that does not "
                f"adapt"
            )
        if not hasattr(pl_module, "compression_ratio"):
            raise ValueError(
                f"{type(pl_module).__name__} has no attribute compression_ratio, so the Curriculum would "
                f"change nothing: train a module that evicts, or remove the callback"
            )
        self.schedule = self.schedule.over(trainer.max_steps)
        pl_module.compression_ratio = self.schedule.ratio(trainer.global_step)  # type: ignore[assignment]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise ``ValueError`` before the first step if an adaptive schedule would never see a validation."""
        if not self.schedule.observes:
            return
        batches, every = sum(trainer.num_val_batches), trainer.val_check_batch or 0  # None: validation by wall time
        trained = trainer.max_steps * trainer.accumulate_grad_batches
        if batches == 0 or (0 < trained < every):
            what = "validation has no cases" if batches == 0 else f"validation comes after {every} of {trained} batches"
            raise ValueError(
                f"{type(self.schedule).__name__} adapts to {self.monitor!r}, but {what}: give data.validation_windows "
                "or data.validation_needles above 0 and a trainer.val_check_interval within the run, or choose a "
                "schedule that does not adapt"
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set and log the ratio of this step."""
        ratio = self.schedule.ratio(trainer.global_step)
        pl_module.compression_ratio = ratio  # type: ignore[assignment]
        pl_module.log("curriculum/compression_ratio", ratio, on_step=True, on_epoch=False)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the newest perplexity to an adaptive schedule."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not self.schedule.observes:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"{type(self.schedule).__name__} adapts to {self.monitor!r}, which validation did not log. "
                f"Set Curriculum.monitor to one of the logged metrics: {sorted(trainer.callback_metrics)}"
            )
        perplexity = float(trainer.callback_metrics[self.monitor])
        self.schedule.observe(trainer.strategy.broadcast(perplexity))

    def export_state(self, step: int) -> dict[str, Any]:
        """Describe the curriculum at optimizer step ``step``, JSON-able, for an exported adapter."""
        return {
            "step": step,
            "compression_ratio": self.schedule.ratio(step),
            "schedule": self.schedule.describe(),
            "state": self.schedule.state_dict(),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)
