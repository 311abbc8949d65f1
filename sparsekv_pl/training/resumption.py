"""Resume with this run's settings: they are applied where that is well defined, else refused by name.

Lightning restores optimizers, learning-rate schedules and callbacks with their saved settings, so a longer schedule or
another learning rate would silently be ignored.
"""

import inspect
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from sparsekv_pl.storage.fingerprint import weights_digest
from sparsekv_pl.training.plateau_resumption import VALIDATION, continue_plateau, validated

log = logging.getLogger(__name__)

RECORD = "decided_by"
"""Checkpoint key of the settings that cannot change at resume."""
PRECISION = "computed_in"
"""Checkpoint key of the trainer's precision, which depends on the machine and may change at resume."""
SHOWN = 3
"""Differences that a message lists."""
NEW_RUN = "or start a new run from what was exported (model.backbone.adapter) without ckpt_path"


class Resumption(Callback):
    """Give a resumed run the settings of this run. Modules that train add it (``guards``).

    The optimizer's state (its moments) comes from the checkpoint; its settings are this run's, and the learning rate is
    that of this run's schedule after as many steps. A ReduceLROnPlateau has followed validations that no replay has: it
    goes on with the checkpoint's rate and counts. Callbacks keep their constructor arguments.
    """

    def __init__(self) -> None:
        self._resumed = False
        self._validation: dict[str, Any] | None = None
        self._checkpoint: dict[str, Any] = {}
        self._given: dict[int, dict[str, Any]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._given = {id(callback): _settings(callback) for callback in callbacks}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = _decided(pl_module)
        checkpoint[PRECISION] = str(trainer.precision)
        if self._validation is not None and self._validation["batch"] == trainer.fit_loop.batch_idx:
            checkpoint[VALIDATION] = self._validation

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = True
        self._checkpoint = {name: checkpoint[name] for name in ("lr_schedulers", VALIDATION) if name in checkpoint}
        was, now = checkpoint.get(PRECISION), str(trainer.precision)
        if was not in (None, now):
            log.warning(
                "the checkpoint was trained in %s, this run continues in %s: losses differ in their last digits; "
                "--trainer.precision %s computes as before",
                *(was, now, was),
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply this run's settings, after Lightning has restored everything."""
        if not self._resumed:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name, value in self._given.get(id(callback), {}).items():
                if value is not None and getattr(callback, name) is not value:  # None is filled in at setup
                    setattr(callback, name, value)
        _apply(pl_module, trainer, self._checkpoint)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validation = validated(trainer)


def check_resumable(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` that names the settings and parameters with which ``checkpoint`` cannot be continued."""
    done, planned = checkpoint.get("global_step", 0), module.trainer.max_steps
    if 0 <= planned < done:
        raise ValueError(f"trainer.max_steps is {planned}, but the checkpoint is of step {done}: give {done} or more")
    saved, own = checkpoint.get(RECORD, {}), _decided(module)
    different = [f"{name} was {saved[name]}, is {own.get(name)}" for name in saved if saved[name] != own.get(name)]
    different += _parameters(module, checkpoint.get("state_dict"))
    if different:
        more = f"; {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise ValueError(
            f"the checkpoint's training cannot continue in this run: {'; '.join(different[:SHOWN])}{more}. Go back to "
            f"the saved settings, {NEW_RUN}"
        )


def _decided(module: LightningModule) -> dict[str, Any]:
    """Return the settings that the trained weights and the optimizer's moments depend on."""
    backbone: Any = module.backbone
    adapter = getattr(module.model, "peft_config", {}).get("default")
    optimizer = module.optimizer([nn.Parameter(torch.zeros(2, 2))])  # type: ignore[operator]
    return {
        "the base's weights (model.backbone.pretrained)": weights_digest(backbone.files())[:12],
        "model.backbone.load_in_4bit": backbone.load_in_4bit,
        "model.backbone.lora.alpha": getattr(adapter, "lora_alpha", None),
        "model.optimizer": type(optimizer).__name__,
    }


def _parameters(module: LightningModule, saved: Mapping[str, Any] | None) -> list[str]:
    """List trainable parameters that differ in name or shape; sharded checkpoints are checked when they are loaded."""
    if saved is None:
        return []
    trains = {name: tuple(value.shape) for name, value in module.named_parameters() if value.requires_grad}
    known = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    new = [f"{name} trains, and the checkpoint has none" for name in trains if name not in saved]
    gone = [f"{name} is only in the checkpoint" for name in saved if name not in known]
    shapes = [
        f"{name} was {tuple(saved[name].shape)}, is {shape}"
        for name, shape in trains.items()
        if name in saved and tuple(saved[name].shape) != shape
    ]
    return [*shapes, *new, *gone]


def _apply(module: LightningModule, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Set the optimizer and its schedule to this run's settings, at the step of ``checkpoint``."""
    made: Any = module.configure_optimizers()
    fresh: Optimizer = made["optimizer"] if isinstance(made, dict) else made
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    if schedules:
        schedule: LRScheduler = made["lr_scheduler"]["scheduler"]
        if isinstance(schedule, ReduceLROnPlateau):
            continue_plateau(schedule, trainer, checkpoint)
        else:
            _step(schedule, trainer.global_step)
        schedules[0].load_state_dict(schedule.state_dict())
    changed: dict[str, str] = {}
    for group, given in zip(trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
        settings = {name: value for name, value in given.items() if name != "params"}
        before = {name: value for name, value in group.items() if name != "params"}
        changed |= {
            name: f"{name} {before.get(name)} -> {value}"
            for name, value in settings.items()
            if before.get(name) != value
        }
        for name in before:
            del group[name]
        group.update(settings)
    if changed:
        log.warning("resumed at step %d with this run's %s", trainer.global_step, ", ".join(changed.values()))


def _step(schedule: LRScheduler, steps: int) -> None:
    """Advance ``schedule`` by ``steps``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped
        try:
            for _ in range(steps):
                schedule.step()
        except ValueError as error:
            raise ValueError(
                f"model.lr_scheduler ends before step {steps}, at which the checkpoint is: give it more ({error})"
            ) from error


def _settings(callback: Callback) -> dict[str, Any]:
    """Return a callback's constructor arguments, as far as it keeps them under the same names."""
    names = inspect.signature(type(callback).__init__).parameters
    return {name: getattr(callback, name) for name in names if name in vars(callback)}
