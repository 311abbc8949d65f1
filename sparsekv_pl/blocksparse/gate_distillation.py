"""The LightningModule that trains attention gates on the attention of the model itself."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from sparsekv_pl.attention.evicted_attention import CACHED, Observer, attention_implementation
from sparsekv_pl.blocksparse.gate import AttentionGates
from sparsekv_pl.blocksparse.true_blocks import BlockAttention, block_attention
from sparsekv_pl.eviction.limits import check_positions
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.base_model import base_record
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.training.non_finite_guard import guards, watch
from sparsekv_pl.training.optimizers import configured
from sparsekv_pl.training.resumption import check_resumable

TOP, SHARE = 16, 4
"""Validation compares the best 16 blocks of a row, or the best quarter of the visible blocks if that is fewer."""


class GateDistillation(LightningModule):
    """Self-distillation of attention gates (SeerAttention, https://arxiv.org/abs/2410.13276); the backbone is frozen.

    With P[i, j] the largest probability of any query of block i on any key of block j, and G the gate's scores,

        loss = mean over layers, rows, heads and query blocks i of sum_j T[i, j] (log T[i, j] - log G[i, j]),
        T[i, j] = P[i, j] / sum_j P[i, j],

    in nats. Query block 0 only sees itself and adds 0. Context and continuation form one text. All layers are trained
    in one pass, which stores only the pooled blocks of a layer for the gradient.

    Validation logs loss, ``recall`` (share of the best blocks by P that are among the gate's best; see ``TOP``),
    ``mass`` (attention on the gate's best blocks) and ``mass_best`` (on the best blocks), the last three without query
    block 0. Raises ``ValueError`` for a model whose RoPE gates do not support, and for sizes out of range.

    Parameters
    ----------
    backbone
        The frozen model whose attention is the target. ``lora`` is ignored; ``adapter`` is not.
    block_size
        Tokens per block.
    gate_dim
        Width of the projections.
    optimizer
        Called with the gates' parameters.
    lr_scheduler
        Called with the optimizer; steps once per optimizer step. None keeps the learning rate.
    """

    def __init__(
        self,
        backbone: Backbone,
        block_size: int = 64,
        gate_dim: int = 64,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.optimizer, self.lr_scheduler = backbone, optimizer, lr_scheduler
        self.lr: float | None = None
        self.strict_loading = False  # checkpoints hold the gates; the frozen model comes from `backbone`
        self.model, self.tokenizer = backbone.load(trainable=False)
        self.model.requires_grad_(False)
        self.gates = AttentionGates.for_model(causal_lm(self.model), block_size, gate_dim)

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Raise ``ValueError`` if the data's contexts are shorter than two blocks, or too long for the model."""
        data, size = self.trainer.datamodule, self.gates.shape.block_size  # type: ignore[attr-defined]
        context_tokens = getattr(data, "context_tokens", None)
        if context_tokens is None:
            return
        if context_tokens < 2 * size:
            raise ValueError(
                f"context_tokens={context_tokens} are fewer than two blocks of {size}, so there is nothing to select: "
                "use longer contexts or a smaller block_size"
            )
        tokens = context_tokens + getattr(data, "continuation_tokens", 0)
        check_positions(causal_lm(self.model), tokens, tokens, rotates=False)

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of all gates on one batch, and log it."""
        loss = self.loss(batch)
        watch(self, {"loss": loss}, batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["context_ids"]))
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """The loss on one batch, averaged over layers, with a gradient in the gates."""
        losses: list[Tensor] = []

        def learn(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG001
            target = block_attention(query, key, self.gates.shape.block_size).peak
            with torch.enable_grad():
                losses.append(gate_loss(target, self.gates.gate(layer).log_scores(query, key)))

        self._observe(batch, learn)
        return stacked(losses).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Log the loss by layer and its mean, and the means of recall and mass."""
        measured: dict[str, list[Tensor]] = {}

        def measure(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG001
            truth = block_attention(query, key, self.gates.shape.block_size)
            log_scores = self.gates.gate(layer).log_scores(query, key)
            found = {"loss": gate_loss(truth.peak, log_scores), **best_blocks(truth, log_scores)}
            for name, value_ in found.items():
                measured.setdefault(name, []).append(value_)

        self._observe(batch, measure)
        logs = {f"val/{name}": stacked(values).mean() for name, values in measured.items()}
        logs |= {f"val/loss_layer_{layer:02d}": value for layer, value in enumerate(measured["loss"])}
        self.log_dict(logs, on_epoch=True, batch_size=len(batch["context_ids"]), sync_dist=True)

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that keep a loss that is not finite from the optimizer."""
        return guards(self.trainer)

    def configure_optimizers(self) -> Any:
        """The optimizer over the gates, and the learning-rate schedule if there is one."""
        return configured(self, self.gates.parameters())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ``ValueError`` for a checkpoint that this run cannot resume."""
        check_resumable(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the gates in the checkpoint."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name.startswith("gates.")}

    def save_trained(self, folder: Path) -> None:
        """Write the gates for ``AttentionGates.load``; the export calls this instead of saving a model."""
        self.gates.save(folder)

    def describe_training(self) -> dict[str, Any]:
        """The training's settings for the export's training.json, JSON-able."""
        shape = self.gates.shape
        return {
            **base_record(self.backbone),
            "adapter": self.backbone.adapter,
            "objective": type(self).__name__,
            "block_size": shape.block_size,
            "gate_dim": shape.gate_dim,
        }

    @torch.no_grad()
    def _observe(self, batch: Batch, observer: Observer) -> None:
        """Run the frozen model once for ``observer``, without storing anything else."""
        model = causal_lm(self.model)
        with attention_implementation(model, CACHED):
            decoder_of(model)(input_ids=self._text(batch), use_cache=False, observer=observer)

    def _text(self, batch: Batch) -> Tensor:
        """(B, S): contexts with continuations, cut to the shortest continuation so that there is no padding."""
        continuation = batch["continuation_ids"]
        to_come = (continuation != self.tokenizer.pad_token_id).flip(1).cumsum(1)
        shortest = int((to_come > 0).sum(1).min())
        return torch.cat([batch["context_ids"], continuation[:, :shortest]], 1)


def gate_loss(peak: Tensor, log_scores: Tensor) -> Tensor:
    """KL(target || gate) in nats, averaged over rows, heads and query blocks.

    The target is ``peak`` (B, H, N, N), the largest attention between blocks, normalised per query block. The gate's
    ``log_scores`` (B, H, N, N) may be -inf where ``peak`` is 0.
    """
    target = peak / peak.sum(-1, keepdim=True)
    learnt = torch.where(target > 0, log_scores, 0)
    return (torch.special.xlogy(target, target) - target * learnt).sum(-1).mean()


def best_blocks(truth: BlockAttention, scores: Tensor) -> dict[str, Tensor]:
    """Recall and mass of the best blocks by ``scores`` (B, H, N, N), averaged over rows, heads and query blocks > 0.

    ``TOP`` and ``SHARE`` set the number of best blocks.
    """
    visible = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    count = (-(-visible // SHARE)).clamp(max=TOP)[1:, None]

    def chosen(values: Tensor) -> Tensor:
        later = visible > visible[:, None]
        order = values.masked_fill(later, -torch.inf).argsort(stable=True, dim=-1, descending=True)
        return order.argsort(-1)[:, :, 1:] < count

    gates, mass = chosen(scores), truth.mass[:, :, 1:]
    return {
        "recall": ((gates & chosen(truth.peak)).sum(-1) / count[:, 0]).mean(),
        "mass": (mass * gates).sum(-1).mean(),
        "mass_best": (mass * chosen(truth.mass)).sum(-1).mean(),
    }
