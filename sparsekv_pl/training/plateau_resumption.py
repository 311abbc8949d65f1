"""Resume a learning rate that follows validations (ReduceLROnPlateau) as if the run had not stopped.

Lightning steps a plateau after the checkpoint of a validation's step is saved, and once more, without the validation's
metrics, when a run resumes at such a step. So checkpoints hold the metrics, and the plateau as it was before them.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

log = logging.getLogger(__name__)

VALIDATION = "last_validation"
"""Checkpoint key of ``validated``'s result, if no batch has been trained since."""
PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""What a plateau has counted; the rest of its state are settings."""


def validated(trainer: Trainer) -> dict[str, Any]:
    """Describe a validation that has just ended, in plain values: its metrics, the batch, the plateau and the rates."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    followed = [vars(schedule) for schedule in schedules if isinstance(schedule, ReduceLROnPlateau)]
    return {
        "batch": trainer.fit_loop.batch_idx,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "plateau": {name: followed[0][name] for name in PROGRESS} if followed else None,
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }


def continue_plateau(plateau: ReduceLROnPlateau, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Give ``plateau`` the checkpoint's counts, and its optimizer the rates; its settings stay.

    After another schedule, or none, it begins. Raises ``ValueError`` if the checkpoint's plateau followed another
    metric.
    """
    schedules, validation = checkpoint.get("lr_schedulers"), checkpoint.get(VALIDATION)
    saved = schedules[0] if schedules else {}
    if saved.keys() >= set(PROGRESS):
        _check_metric(plateau, saved)
        counts, rates = saved, [group["lr"] for group in trainer.optimizers[0].param_groups]
        if validation is not None:
            counts, rates = validation["plateau"], validation["rates"]
        plateau.load_state_dict({name: counts[name] for name in PROGRESS})
        for group, rate in zip(plateau.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        log.warning("ReduceLROnPlateau goes on at the checkpoint's learning rate, %s", ", ".join(map(str, rates)))
    monitor = plateau.monitor  # type: ignore[attr-defined]
    if validation is not None and monitor in validation["metrics"]:
        trainer.callback_metrics[monitor] = torch.tensor(validation["metrics"][monitor])


def _check_metric(plateau: ReduceLROnPlateau, saved: Mapping[str, Any]) -> None:
    for name in ("monitor", "mode"):
        was, now = saved.get(name), getattr(plateau, name)
        if was != now:
            raise ValueError(
                f"model.lr_scheduler.{name} is {now}, and the checkpoint's ReduceLROnPlateau has followed {was}: go "
                f"back to {was}, or start a new run from what was exported (model.backbone.adapter) without ckpt_path"
            )
