"""Adapt or refuse the Trainer's epoch settings for an endless training stream."""

from collections.abc import Iterable

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)

NEED_EPOCHS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "changes accumulation from epoch to epoch: set trainer.accumulate_grad_batches",
    StochasticWeightAveraging: "averages at the ends of epochs: leave it out",
}
"""Callbacks that would have no effect or another one than configured -> the reason and the fix."""


def batches_to_train(trainer: Trainer) -> int:
    """Return the number of batches that one rank trains on; with fast_dev_run or overfit_batches, of one epoch.

    Raises ``ValueError`` if ``trainer.max_steps`` does not determine the length, or the length is 0.
    """
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps is {trainer.max_steps}: set it, the training stream has no end")
    if trainer.max_epochs == 0 or trainer.limit_train_batches == 0:
        name = "max_epochs" if trainer.max_epochs == 0 else "limit_train_batches"
        raise ValueError(f"trainer.{name} is 0, which trains nothing: leave it out, or validate alone")
    overfit, limit = trainer.overfit_batches, trainer.limit_train_batches  # type: ignore[attr-defined]
    if overfit and isinstance(overfit, float):
        raise ValueError(f"trainer.overfit_batches is {overfit}: give a whole number, the training stream has no end")
    if overfit and trainer.ckpt_path is not None:
        raise ValueError("trainer.overfit_batches begins with the first batches again: leave ckpt_path out")
    if overfit or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return int(limit)
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    if limit < batches if isinstance(limit, int) else limit != 1.0:
        raise ValueError(
            f"trainer.limit_train_batches is {limit}: set trainer.max_steps alone, the training stream has no epochs"
        )
    return batches


def without_epochs(trainer: Trainer) -> None:
    """Adapt the trainer's epoch settings to a stream without epochs, before training.

    The whole training counts as one epoch. A ``val_check_interval`` that is a share becomes a number of batches of the
    training (1.0: at its end), so that callbacks that run after validation expect several in the epoch. With real
    epochs (fast_dev_run, overfit_batches) nothing changes. Raises ``ValueError`` for settings without a meaning, or
    with no effect: one line with the setting and the fix.
    """
    batches = batches_to_train(trainer)
    if trainer.fast_dev_run or trainer.overfit_batches:  # type: ignore[attr-defined]
        return
    _settle_least_epochs(trainer)
    _check_callbacks(trainer, trainer.callbacks)  # type: ignore[attr-defined]
    if trainer.enable_validation:
        _settle_validation(trainer, batches)


def _settle_least_epochs(trainer: Trainer) -> None:
    if trainer.min_epochs and not (trainer.min_epochs == 1 and trainer.min_steps):
        raise ValueError(
            f"trainer.min_epochs is {trainer.min_epochs}: set trainer.min_steps, the training stream has no epochs"
        )
    trainer.fit_loop.min_epochs = 0  # Lightning sets it to 1 if min_steps is set, which would prevent early stopping


def _settle_validation(trainer: Trainer, batches: int) -> None:
    if trainer.check_val_every_n_epoch not in (None, 1):
        raise ValueError(
            f"trainer.check_val_every_n_epoch is {trainer.check_val_every_n_epoch}: set trainer.val_check_interval, "
            "the training stream has no epochs"
        )
    if trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        return
    asked = trainer.val_check_interval
    interval = max(1, int(asked * batches)) if isinstance(asked, float) else asked
    if not 1 <= interval <= batches or asked == 0:
        raise ValueError(
            f"trainer.val_check_interval is {asked} batches, and the training ends after {batches}: it would never "
            f"validate. Give 1 to {batches}, a share of the training (0.5), or limit_val_batches 0"
        )
    trainer.val_check_interval, trainer.check_val_every_n_epoch = interval, None


def _check_callbacks(trainer: Trainer, callbacks: Iterable[Callback]) -> None:
    for callback in callbacks:
        name = type(callback).__name__
        for kind, reason in NEED_EPOCHS.items():
            if isinstance(callback, kind):
                raise ValueError(f"{name} {reason}, the training stream has no epochs")
        if isinstance(callback, Timer) and callback._interval == "epoch":
            raise ValueError(f"{name}.interval is epoch: give step, the training stream has no epochs")
        if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end:
            raise ValueError(
                f"{name}.check_on_train_epoch_end is true: leave it out to check after every validation, the training "
                "stream has no epochs"
            )
        monitor = getattr(callback, "monitor", None) or ""
        needs = isinstance(callback, EarlyStopping) or (
            isinstance(callback, ModelCheckpoint) and monitor.startswith("val/")
        )
        if needs and not trainer.enable_validation:
            raise ValueError(
                f"{name} waits for {monitor} of a validation, and this run has none: give limit_val_batches above 0"
            )
