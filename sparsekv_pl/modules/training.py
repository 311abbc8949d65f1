"""What every module that trains does with its optimizer and with a loss that is not finite."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor
from torch.optim import Optimizer

from sparsekv_pl.batch import Batch


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; the optimizer has not stepped on it."""


def optimizers(optimizer: Optimizer, lr_scheduler: LRSchedulerCallable | None) -> Any:
    """What ``configure_optimizers`` returns; the schedule, if there is one, steps once per optimizer step."""
    if lr_scheduler is None:
        return optimizer
    schedule = {"scheduler": lr_scheduler(optimizer), "interval": "step", "name": "learning_rate"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def stop_if_not_finite(module: LightningModule, terms: Mapping[str, Tensor], batch: Batch, **told: object) -> None:
    """Raise ``NonFiniteLossError`` if ``terms["loss"]`` is not finite: where, on what, what was saved last."""
    if torch.isfinite(terms["loss"]):
        return
    saver = module.trainer.checkpoint_callback
    last = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "") or "none yet"
    facts = {"terms": {name: value.item() for name, value in terms.items()}, **told, "documents": batch["document_ids"]}
    raise NonFiniteLossError(
        f"the loss is {terms['loss'].item()} at step {module.global_step} "
        f"({'; '.join(f'{name}: {value}' for name, value in facts.items())}). Last good checkpoint: {last}. "
        "Try a lower learning rate, gradient_clip_val, or precision 32-true."
    )
