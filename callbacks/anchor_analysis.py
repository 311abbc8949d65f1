"""Measure attention during training by token type, on sinks and on recent tokens, by layer and head."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from rich import box
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from sparsekv_pl.analysis.anchor_attention import observed
from sparsekv_pl.analysis.anchor_figures import layers_figure
from sparsekv_pl.analysis.anchor_profile import LEADING, AnchorProfile, profile_records
from sparsekv_pl.analysis.anchor_report import layer_table, type_rows
from sparsekv_pl.analysis.token_types import types_for
from sparsekv_pl.attention.received_attention import ReceivedAttention
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.models.evaluation_mode import evaluating
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.file_formats import json_bytes, replace_all
from sparsekv_pl.reporting.loggers import left_out, log_picture, log_scores
from sparsekv_pl.reporting.plots import pixels, png

RECENT = 64
"""Number of tokens before a query that count as recent, as in ``Anchors``."""


class AnchorAnalysisCallback(pl.Callback):
    """Measure the attention of a fixed probe batch before, during and after training, with the adapter on.

    The probe is the context of the first training batch, before the first step; it is saved with the checkpoint. A
    measurement is one pass without gradient in evaluation mode. It draws no random numbers, reads no data and restores
    every module's mode, so it does not change training. All ranks run the pass over rank 0's probe, because sharded
    weights (FSDP) can only be used together; rank 0 logs and writes.

    At the end ``anchor_analysis.json`` and ``anchor_analysis.png`` (before and after) are written to the trainer's
    ``default_root_dir``, and a table is printed. Raises ``ValueError`` for a setting out of range.

    Parameters
    ----------
    every_n_steps
        Optimizer steps from one measurement to the next, in addition to the start and the end.
    rows
        Most rows of the batch in the probe.
    sinks
        Number of first tokens that count as sinks; token types exclude them.
    carrying
        Share of a head's attention for ``anchors/carrying_tokens``, above 0 and at most 1.

    Logs
    ----
    anchors/share_sinks, anchors/share_recent, anchors/share_TYPE
        Share of all attention; recent are the 64 nearest tokens without sinks. Types without tokens are not logged.
    anchors/per_token_TYPE
        Mean attention that a token of the type receives from a query that sees it.
    anchors/times_chance_TYPE
        The type's attention divided by what it would get if attention were spread evenly over all tokens but sinks.
    anchors/carrying_tokens
        Smallest share of a row's tokens that receives the share ``carrying`` of a head's attention, a mean over heads.
    anchors/layers, anchors/log10_attention_per_token
        Heat maps, for loggers that take images, and a histogram, for TensorBoard only.
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 4, sinks: int = 4, carrying: float = 0.8) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("rows", rows)):
            if value < 1:
                raise ValueError(f"AnchorAnalysisCallback.{name} is {value}: give 1 or more")
        if not 0 <= sinks <= LEADING:
            raise ValueError(f"AnchorAnalysisCallback.sinks is {sinks}: give 0 to {LEADING}")
        if not 0 < carrying <= 1:
            raise ValueError(f"AnchorAnalysisCallback.carrying is {carrying}: give a share above 0 and at most 1")
        self.every_n_steps, self.rows, self.sinks, self.carrying = every_n_steps, rows, sinks, carrying
        self.probe: list[list[int]] = []
        """Token ids of the probe, one list per row."""
        self.measured: list[dict[str, Any]] = []
        """Measurements so far, each with "step", "scalars" and "layers" (layer x type)."""

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Take the probe from the first batch and measure it before the first step."""
        if not self.measured:
            self.probe = trainer.strategy.broadcast(batch["context_ids"][: self.rows].tolist())
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure after every ``every_n_steps`` optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure after the last step; write and print the first and last measurements."""
        if not self.measured:
            return
        self._measure(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(Path(trainer.default_root_dir))
            self._print_table()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"probe": self.probe, "measured": self.measured}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.probe, self.measured = state_dict["probe"], state_dict["measured"]

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.measured and self.measured[-1]["step"] == trainer.global_step:
            return
        ids = torch.tensor(self.probe, device=pl_module.device)
        types = types_for(pl_module.tokenizer).of(ids)  # type: ignore[arg-type]
        with evaluating(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
            observer = observed(causal_lm(pl_module.model), ids, types)
        profile = AnchorProfile.of(profile_records(observer, types, self.carrying))
        found = {
            "step": trainer.global_step,
            "scalars": probe_scalars(profile, self.sinks),
            "layers": layer_table(profile, self.sinks, sorted(observer.layers)),
        }
        self.measured.append(found)
        if trainer.is_global_zero:
            self._log(trainer, found, per_token(observer))

    def _log(self, trainer: pl.Trainer, found: dict[str, Any], attention: Tensor) -> None:
        step, histogram = found["step"], "anchors/log10_attention_per_token"
        log_scores(trainer.loggers, {f"anchors/{name}": value for name, value in found["scalars"].items()}, step)
        if trainer.loggers:
            picture = layers_figure({f"step {step}": found["layers"]})
            log_picture(trainer.loggers, "anchors/layers", pixels(picture), step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(histogram, attention.log10(), step)
            elif not isinstance(logger, DummyLogger):
                left_out(logger, f"histogram {histogram}")

    def _write(self, folder: Path) -> None:
        before, after = self.measured[0], self.measured[-1]
        layers = {f"{name} (step {one['step']})": one["layers"] for name, one in (("before", before), ("after", after))}
        content = {
            "probe": {"rows": len(self.probe), "tokens": len(self.probe[0]), "ids": self.probe},
            "sinks": self.sinks,
            "carrying": self.carrying,
            "before": before,
            "after": after,
            "measured": [{"step": found["step"], **found["scalars"]} for found in self.measured],
        }
        replace_all(
            folder, {"anchor_analysis.json": json_bytes(content), "anchor_analysis.png": png(layers_figure(layers))}
        )

    def _print_table(self) -> None:
        before, after = self.measured[0], self.measured[-1]
        table = Table(box=box.SIMPLE_HEAD, title="attention of the probe batch", title_justify="left")
        for heading in ("", f"before (step {before['step']})", f"after (step {after['step']})", "change"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, old in before["scalars"].items():
            new = after["scalars"][name]
            table.add_row(name, f"{old:.4g}", f"{new:.4g}", f"{new - old:+.2g}")
        show(table)


def probe_scalars(profile: AnchorProfile, sinks: int) -> dict[str, float]:
    """Return the logged scalars by name; token types that the probe does not contain are left out."""
    first, nearest = profile.sinks(sinks), profile.recent(min(RECENT, profile.edges[-1]))
    scalars = {
        "share_sinks": profile.portion(first).attention,
        "share_recent": profile.portion(nearest & ~first).attention,
        "carrying_tokens": float(profile.carrying.mean()),
    }
    for row in type_rows(profile, sinks)[1:]:
        name = row["type"].replace(" ", "_")
        if row["per_token"] is not None:
            scalars[f"share_{name}"] = row["attention"]
            scalars[f"per_token_{name}"] = row["per_token"]
            scalars[f"times_chance_{name}"] = row["times_chance"]
    return scalars


def per_token(observer: ReceivedAttention) -> Tensor:
    """Return the mean attention (B, S) that each token receives from queries that see it, over layers and heads.

    Clamped to be above 0.
    """
    received = stacked([layer.by_key.mean(1) for layer in observer.layers.values()]).mean(0).cpu()
    queries = torch.arange(received.shape[1], 0, -1)
    return (received / queries).clamp(min=1e-12)
