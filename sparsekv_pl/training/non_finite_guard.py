"""The guard against losses and gradients that are not finite, for every module that trains."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from sparsekv_pl.evaluation.refused_callbacks import refuse_callbacks
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.training.precision import check_precision
from sparsekv_pl.training.resumption import Resumption

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became infinite or NaN; the optimizer has not stepped on it."""


class MicroBatch(NamedTuple):
    """One batch of an accumulation window, with its loss terms."""

    terms: dict[str, Tensor]
    """Name -> detached scalar; ``"loss"`` is differentiated."""
    details: dict[str, object]
    """Name -> value, for messages."""
    documents: list[str]
    """The ids of the batch's documents."""

    def __str__(self) -> str:
        terms = {name: value.item() for name, value in self.terms.items()}
        return "; ".join(f"{k}: {v}" for k, v in {"terms": terms, **self.details, "documents": self.documents}.items())


class NonFinite(Callback):
    """Keep the optimizer from stepping on a loss or a gradient that is infinite or NaN.

    One such batch, on any rank and anywhere in an accumulation window, invalidates the window. All ranks then skip its
    optimizer step together: parameters and the optimizer's state do not change, but the step is counted, so curriculum
    and learning rate advance. Modules that train add this callback if the trainer has none (``guards``).

    A float16 loss scaler handles gradients that overflow: it halves its factor and tries the next batch. They count
    here once its factor is below 1, when halving has not helped.

    Parameters
    ----------
    skip
        Optimizer steps in a row that may be skipped; one more raises ``NonFiniteLossError``. 0 stops at the first.

    Logs
    ----
    train/skipped_steps
        Optimizer steps skipped so far, continued from the checkpoint at resume.

    Raises
    ------
    ValueError
        If ``skip`` is negative.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f"NonFinite.skip={skip}: give 0 or more optimizer steps")
        self.skip = skip
        self.skipped = self.in_a_row = 0
        self._window: list[MicroBatch] = []

    def watch(self, batch: MicroBatch) -> None:
        """Add a batch whose loss is about to be differentiated to the accumulation window."""
        self._window.append(batch)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``ValueError`` for a precision in which training would fail."""
        check_precision(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window.clear()  # gradients of a window that was interrupted are gone as well

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Skip the step or stop, on all ranks together; gradients are complete and unscaled here, but not clipped."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaling = scaler is not None and scaler.get_scale() >= 1
        fault = _fault(self._window, optimizer, scaling)
        self._window.clear()
        if trainer.strategy.reduce_boolean_decision(not fault):
            self.in_a_row = 0
        else:
            self._skip(trainer, fault)
            optimizer.zero_grad(set_to_none=True)  # without gradients no optimizer touches weights or state
        pl_module.log("train/skipped_steps", torch.tensor(float(self.skipped)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def _skip(self, trainer: Trainer, fault: str) -> None:
        step, fault = trainer.global_step, fault or "a loss or gradient of another rank is not finite"
        if self.in_a_row >= self.skip:  # above it after a resume with a lower limit
            raise NonFiniteLossError(
                f"at step {step} {fault}. {self.in_a_row} steps in a row were skipped before it (NonFinite.skip="
                f"{self.skip}). Last good checkpoint: {_last_checkpoint(trainer)}. "
                "Try a lower learning rate, gradient_clip_val, or precision 32-true."
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        log.warning("Skipped optimizer step %d (%d in a row, %d in all): %s", step, self.in_a_row, self.skipped, fault)


def guards(trainer: Trainer) -> list[Callback]:
    """Return ``Resumption`` and, if the trainer has none, a ``NonFinite`` that stops at once, to be added to it.

    Raises
    ------
    ValueError
        For a callback of the trainer that cannot work here.
    """
    refuse_callbacks(trainer)
    given = trainer.callbacks  # type: ignore[attr-defined]
    return [Resumption(), *([] if any(isinstance(callback, NonFinite) for callback in given) else [NonFinite()])]


def watch(module: LightningModule, terms: Mapping[str, Tensor], batch: Batch, **details: object) -> None:
    """Pass ``terms`` to the trainer's ``NonFinite``; "loss" is differentiated, ``details`` are for messages.

    Nothing is raised here: under DDP the other ranks would wait for this one's gradients for ever.
    """
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    detached = {name: term.detach() for name, term in terms.items()}
    for guard in callbacks:
        if isinstance(guard, NonFinite):  # none while Lightning's batch-size and learning-rate finders run
            guard.watch(MicroBatch(detached, details, batch["document_ids"]))


def _fault(window: list[MicroBatch], optimizer: Optimizer, scaling: bool) -> str:
    """Describe what is not finite on this rank, and on which documents; empty if everything is finite."""
    seen = [batch.terms["loss"] for batch in window]
    if not scaling:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients])
        seen.append(norm)
    if (
        not seen or torch.stack([value.isfinite().to(seen[0].device) for value in seen]).all()
    ):  # the step's only synchronisation
        return ""
    bad = [batch for batch in window if not torch.isfinite(batch.terms["loss"])]
    if bad:
        return f"the loss is {bad[0].terms['loss'].item()} ({' | '.join(map(str, bad))})"
    return f"the gradient norm is {norm.item()} and this rank's losses are finite ({' | '.join(map(str, window))})"


def _last_checkpoint(trainer: Trainer) -> str:
    saver = trainer.checkpoint_callback
    return getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "") or "none yet"
