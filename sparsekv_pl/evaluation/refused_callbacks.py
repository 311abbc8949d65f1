"""Lightning's callbacks that cannot work here, refused by name before anything runs."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
)

IN_TRAINING: dict[type[Callback], str] = {
    BackboneFinetuning: "freezes layers by itself; here model.backbone.lora chooses what trains (null: all weights)",
    ModelPruning: "zeroes weights that adapters and exports do not carry",
}
IN_EVALUATION: dict[type[Callback], str] = {
    **IN_TRAINING,
    BatchSizeFinder: "would measure cases twice; set data.batch_size",
}


def refuse_callbacks(trainer: Trainer) -> None:
    """Raise ``ValueError`` for the trainer's first callback that cannot work with its module."""
    fitting = trainer.state.fn == "fit"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for kind, reason in (IN_TRAINING if fitting else IN_EVALUATION).items():
            if isinstance(callback, kind):
                raise ValueError(f"{name} {reason}: leave it out")
        module = trainer.lightning_module
        if isinstance(callback, LearningRateFinder) and fitting and getattr(module, "lr_scheduler", None) is not None:
            raise ValueError(f"{name} finds a rate that model.lr_scheduler would overwrite: set lr_scheduler to null")
