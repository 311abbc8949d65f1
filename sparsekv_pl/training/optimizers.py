"""Optimizer, learning rate and schedule of a module that trains, in the form that the trainer takes."""

from collections.abc import Iterable
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau


class Steps(Protocol):
    """The optimizer settings of a LightningModule that trains."""

    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    lr: float | None
    """Replaces the optimizer's own rate; set by Lightning's LearningRateFinder."""
    trainer: Trainer


def configured(module: Steps, parameters: Iterable[Parameter]) -> Any:
    """Make the result of ``configure_optimizers``; schedules step per optimizer step, a plateau per validation.

    Raises
    ------
    ValueError
        For a ReduceLROnPlateau without a metric, and for a found learning rate that a schedule would overwrite.
    """
    optimizer = module.optimizer(parameters)
    if module.lr is not None:
        if module.lr_scheduler is not None:
            raise ValueError(
                f"the learning rate {module.lr:g} was found for a run without lr_scheduler, which would overwrite it: "
                "set lr_scheduler to null, or write the rate into optimizer and lr_scheduler"
            )
        for group in optimizer.param_groups:
            group["lr"] = module.lr
    if module.lr_scheduler is None:
        return optimizer
    scheduler = module.lr_scheduler(optimizer)
    schedule = {"scheduler": scheduler, "interval": "step", "name": "learning_rate"}
    if isinstance(scheduler, ReduceLROnPlateau):
        schedule |= _after_validations(scheduler, module.trainer)
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def _after_validations(scheduler: ReduceLROnPlateau, trainer: Trainer) -> dict[str, Any]:
    """Return Lightning's settings for a schedule that monitors a validation metric."""
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise ValueError(
            "lr_scheduler is torch's ReduceLROnPlateau, which has no metric to monitor: give "
            "lightning.pytorch.cli.ReduceLROnPlateau with a monitor (val/perplexity_evicted)"
        )
    if not trainer.enable_validation:
        raise ValueError(
            f"ReduceLROnPlateau waits for {monitor} of a validation, and this run has none: give limit_val_batches "
            "above 0"
        )
    if trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        raise ValueError("ReduceLROnPlateau needs validations at known batches: give trainer.val_check_interval as one")
    interval, accumulated = trainer.val_check_interval, trainer.accumulate_grad_batches
    if isinstance(interval, float):  # a share of real epochs
        return {"monitor": monitor, "interval": "epoch", "frequency": trainer.check_val_every_n_epoch or 1}
    if interval % accumulated:
        raise ValueError(
            f"trainer.val_check_interval is {interval} batches, in the middle of an optimizer step of {accumulated}, "
            f"where ReduceLROnPlateau cannot act: give a multiple of {accumulated}"
        )
    return {"monitor": monitor, "frequency": interval}
