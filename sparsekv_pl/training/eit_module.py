"""The LightningModule that trains a model to survive eviction."""

import logging
import os
from dataclasses import asdict, replace
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from kvpress import BasePress
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.limits import check_full_cache, check_positions, check_rows
from sparsekv_pl.eviction.press_model_check import check_press, check_press_alone
from sparsekv_pl.eviction.request import NOTHING
from sparsekv_pl.eviction.while_decoding import check_turns
from sparsekv_pl.metrics import ContinuationPerplexity
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.base_model import base_record
from sparsekv_pl.models.batch import Batch, rows_of_equal_length, supervised_in
from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.models.layer_kinds import evicted_layers, layer_kinds
from sparsekv_pl.models.seeding import seed_for
from sparsekv_pl.models.training_summary import CONTINUED, training_summary
from sparsekv_pl.objectives import EIT, Objective, StudentView
from sparsekv_pl.objectives.losses import token_nll
from sparsekv_pl.objectives.rank_means import means_over_ranks
from sparsekv_pl.presses.nesting import learnable, press_name, scorers_in
from sparsekv_pl.presses.pressed_model import start
from sparsekv_pl.presses.ratio import written_ratio
from sparsekv_pl.presses.step_draws import last
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.reporting.public_settings import public_settings
from sparsekv_pl.training.compatibility import check_evicts_in_evaluation, fit_together
from sparsekv_pl.training.non_finite_guard import guards, watch
from sparsekv_pl.training.optimizers import configured
from sparsekv_pl.training.press_distances import PressDistances
from sparsekv_pl.training.resumption import check_resumable
from sparsekv_pl.training.sharding import shard
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher
from sparsekv_pl.training.validation_mass import ValidationMass
from sparsekv_pl.training.validation_prefill import full_and_evicted

log = logging.getLogger(__name__)

set_parsing_settings(
    subclasses_enabled=[BasePress]
)  # a press is a dataclass: without this YAML could not name a subclass


class EITModule(LightningModule):
    """Eviction-Invariant Training of a causal language model.

    Parameters
    ----------
    backbone
        The model, and which of its weights train.
    eviction
        How the context's KV pairs are evicted: RealEviction (real) or KVDropout.
    objective
        The loss: any of sparsekv_pl.objectives, several through Mixed. Default: EIT.
    optimizer
        Called with the trainable parameters.
    lr_scheduler
        Called with the optimizer; steps once per optimizer step. None keeps the learning rate.
    validation_compression_ratio
        The fixed compression ratio of validation, independent of the curriculum, so that its curve is comparable.
    validation_eviction
        The eviction of validation; another press measures transfer to it. None takes ``eviction``.

    Raises
    ------
    ValueError
        If objective, eviction, press and model do not fit one another, or a setting is out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        eviction: Eviction,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        validation_compression_ratio: float = 0.5,
        validation_eviction: Eviction | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective or EIT()
        check_compression_ratio("validation_compression_ratio", validation_compression_ratio)
        fit_together(self.objective, eviction)
        check_evicts_in_evaluation(validation_eviction or eviction)
        for evicts in (eviction, validation_eviction):
            check_press_alone(None if evicts is None else evicts.press)
        self.backbone, self.continued_from = backbone, training_summary(backbone.adapter)
        self.eviction = eviction
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr: float | None = None
        self.validation_compression_ratio = validation_compression_ratio
        self.compression_ratio: float | None = None
        """The compression ratio of the next training step; the Curriculum callback sets it."""
        self.strict_loading = False  # checkpoints hold what trains; the frozen base comes from `backbone`
        self.model, self.tokenizer = backbone.load()
        for evicts, sets in ((eviction, "the Curriculum"), (validation_eviction, "validation_compression_ratio")):
            press = None if evicts is None else evicts.press
            check_press(causal_lm(self.model), press)
            if written := written_ratio(press):
                log.warning("%s is ignored: %s sets the ratio", written, sets)
        self.teacher = Teacher(self.model)
        for evicting in (eviction, validation_eviction):
            if isinstance(evicting, KVDropout):
                evicting.tokenizer = self.tokenizer
        self.objective.prepare(self.tokenizer)
        config = causal_lm(self.model).config
        self.objective.check_layers(len(layer_kinds(config)), evicted_layers(config))
        self.student = Student(self.model, eviction, self.teacher, self.objective)
        self.validation_student = replace(self.student, eviction=validation_eviction or eviction)
        self.press_parameters = torch.nn.ParameterDict(learnable(self.press) if self.press is not None else {})
        self.val_full = ContinuationPerplexity()
        self.val_evicted = ContinuationPerplexity()
        self.val_mass = ValidationMass(self.validation_student)
        self.distances = PressDistances(self.press)

    @property
    def press(self) -> BasePress | None:
        """The training eviction's press; None if it has none (KVDropout)."""
        return self.eviction.press

    def setup(self, stage: str) -> None:
        """Check, before anything expensive, that a curriculum is set and that the data's contexts can be evicted.

        Raises ``ValueError`` if not.
        """
        self._check_contexts()
        if stage == "fit" and self.press is not None:
            last(self.press, self.trainer.max_steps)
        if stage == "fit" and self.compression_ratio is None:
            raise ValueError(
                "nothing sets how much training evicts: add callbacks.curriculum.Curriculum to trainer.callbacks, "
                "with a schedule (Fixed, say); the press's own compression_ratio is not used"
            )

    def _check_contexts(self) -> None:
        """Raise ``ValueError`` if contexts cannot be evicted from or supervised, or the teacher cannot read them."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        context_tokens = getattr(data, "context_tokens", None)
        if context_tokens is None:
            return
        decodings = [getattr(one, "decoding", None) for one in (self.eviction, self.validation_student.eviction)]
        check_turns(decodings, bool(getattr(data, "turns", None)), "turns")
        reads = context_tokens + getattr(data, "continuation_tokens", 0)
        check_full_cache(
            causal_lm(self.model), reads, self.objective.request.teacher, bool(self.trainer.limit_val_batches)
        )
        lengths = getattr(data, "evicted_lengths", [context_tokens])
        self.objective.check_context(min(lengths))
        for eviction, request in ((self.eviction, self.objective.request), (self.validation_student.eviction, NOTHING)):
            for tokens in lengths:
                eviction.check(tokens, request)
            traits = None if eviction.press is None else traits_of(eviction.press)
            if traits is not None:
                check_rows(traits, getattr(data, "batch_size", 1))
            if traits is None or not all(candidate.re_rotates for candidate in traits.candidates):
                check_positions(causal_lm(self.model), reads, reads, rotates=False)
        if self.trainer.limit_val_batches:
            self.val_mass.follow(lengths)

    def configure_model(self) -> None:
        """Shard the weights over the ranks, if ``backbone.sharded``."""
        shard(self)

    def on_fit_start(self) -> None:
        """Set training mode, since the model loads in evaluation mode, and start the presses."""
        self.train()
        for eviction in (self.eviction, self.validation_student.eviction):
            start(causal_lm(self.model), eviction.press)
        self.distances.start()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Seed torch's generator, from which an adapter's dropout draws, by epoch, batch and rank."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # the argument of seed_everything
        torch.manual_seed(seed_for("adapter dropout", seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch) -> Tensor:
        """Compute and log the objective's terms on contexts evicted at ``compression_ratio``; return the loss."""
        assert self.compression_ratio is not None  # see setup
        terms, kept_share = self.loss_terms(batch, self.compression_ratio, self.global_step)
        watch(self, terms, batch, compression_ratio=f"{self.compression_ratio:.3f}")
        means = means_over_ranks({**terms, "kept_share": torch.full((), kept_share, device=self.device)})
        self._log_step(means, batch)
        self.distances.measure(means)
        return terms["loss"]

    def loss_terms(self, batch: Batch, compression_ratio: float, step: int) -> tuple[dict[str, Tensor], float]:
        """Compute the objective's terms on ``batch``, and the share of KV pairs that was kept."""
        view, kept_share = self.student.view(batch, compression_ratio, step)
        terms = self.objective(view)
        return {**terms, "loss": terms["loss"] + self._nothing(view)}, kept_share

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the perplexity of the supervised tokens with the full cache and under eviction."""
        place = batch_idx * self.trainer.world_size + self.global_rank
        # The sampler repeats first batches to give every rank as many. A repeated one is not counted, but runs, because
        # the model may be sharded.
        again = place >= len(self.trainer.val_dataloaders.dataset)  # type: ignore[union-attr]
        for part in rows_of_equal_length(batch):
            rows, columns = places = supervised_in(part).places()
            labels = part["labels"][rows, columns + 1]
            found = full_and_evicted(
                self.validation_student, part, self.validation_compression_ratio, place, self.val_mass.request
            )
            for metric, hidden in ((self.val_full, found.full), (self.val_evicted, found.evicted)):
                nll = token_nll(hidden[places], self.student.head, labels)
                metric.update(nll[:0] if again else nll)
            self.val_mass.add(part, found.selections, again)
        size = len(batch["labels"])
        self.log("val/perplexity_full", self.val_full, on_epoch=True, batch_size=size)
        self.log("val/perplexity_evicted", self.val_evicted, on_epoch=True, prog_bar=True, batch_size=size)

    def on_validation_epoch_start(self) -> None:
        """Draw presses by their weights alone, so that validations are comparable."""
        self.distances.apply(False)

    def on_validation_epoch_end(self) -> None:
        """Log the attention that each press keeps."""
        self.val_mass.log(self)
        self.distances.apply(True)

    def configure_callbacks(self) -> list[Callback]:
        """Add ``Resumption`` and, if the trainer has none, ``NonFinite``."""
        return guards(self.trainer)

    def configure_optimizers(self) -> Any:
        """Make the optimizer of the trainable parameters, and the learning-rate schedule if there is one."""
        return configured(self, [p for p in self.parameters() if p.requires_grad])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Let the next steps' presses be drawn by the distances of this one."""
        self.distances.settle()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the presses' distances. Raises ``ValueError`` if this run cannot continue the training."""
        check_resumable(self, checkpoint)
        self.distances.load_state_dict(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trainable parameters, as the base weights are on disk already, and add the presses' distances."""
        checkpoint.update(self.distances.state_dict())
        trains = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trains}

    def describe_training(self) -> dict[str, Any]:
        """Describe how the adapter was trained, JSON-able, for the exported adapter's training.json."""
        splits = getattr(getattr(self._trainer, "datamodule", None), "splits", None)
        members = () if self.press is None else traits_of(self.press).members
        return {
            **base_record(self.backbone),
            **({CONTINUED: self.continued_from} if self.continued_from else {}),
            "splits": None if splits is None else asdict(splits),
            "eviction": type(self.eviction).__name__,
            "presses": [member.name for member in members],
            "aligned_presses": self._aligned(),
            "press_settings": public_settings(self.press),
            "objective": type(self.objective).__name__,
            "objective_settings": public_settings(self.objective),
        }

    def _aligned(self) -> list[str]:
        """Return the names of the scorers whose selection the objective aligns."""
        if self.press is None or not self.objective.request.scores:
            return []
        return [press_name(scorer) for scorer in scorers_in(self.press) if traits_of(scorer).trainable]

    def _nothing(self, view: StudentView) -> Tensor:
        """Return zero, with zero gradients in the model and in the presses' parameters.

        DDP waits for a gradient of every parameter, also at a step whose objective or press does not use some of them.
        """
        return sum(((0 * part).sum() for part in self.press_parameters.values()), (0 * view.hidden_NE).sum())

    def _log_step(self, terms: dict[str, Tensor], batch: Batch) -> None:
        logs = {f"train/{name}": value for name, value in terms.items()}
        logs["train/compression_ratio"] = torch.tensor(float(self.compression_ratio or 0))
        self.log_dict(logs, batch_size=batch["labels"].shape[0])
        self.log("loss", terms["loss"], prog_bar=True, logger=False, batch_size=batch["labels"].shape[0])
