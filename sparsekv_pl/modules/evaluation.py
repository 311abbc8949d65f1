"""The LightningModule that measures what a model keeps under eviction, before and after training, on the same cases."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from kvpress import BasePress
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sparsekv_pl.backbone import Backbone, adapter_off, causal_lm
from sparsekv_pl.batch import IGNORE, Batch
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.losses import token_nll
from sparsekv_pl.metrics import CaseValues
from sparsekv_pl.presses.scores import observation_window, press_name, set_compression_ratio
from sparsekv_pl.reporting import (
    Row,
    environment,
    perplexity_interval,
    terminal_table,
    wilson_interval,
    write_report,
)
from sparsekv_pl.schedules import check_compression_ratio

set_parsing_settings(subclasses_enabled=[BasePress])

TRAINING_SUMMARY = "training.json"
"""Written beside an exported adapter by callbacks/adapter_export.py."""


@dataclass
class Setting:
    """A press and the ratios to measure it at."""

    press: BasePress
    compression_ratios: list[float]

    def __post_init__(self) -> None:
        for ratio in self.compression_ratios:
            check_compression_ratio("compression_ratios", ratio)


class EvaluationModule(LightningModule):
    """Needle accuracy and continuation perplexity, with the full cache and under each press and ratio.

    Needle accuracy is the share of cases whose answer greedy decoding would give token by token; it is read off one
    teacher-forced pass (every answer token is the most likely one), which gives the same verdict as decoding.

    Parameters
    ----------
    backbone
        The model; with ``backbone.adapter`` every case is measured twice, with the adapter off (before) and on (after).
    settings
        Presses and ratios. The full cache is always measured.
    output
        Folder for report.json, report.csv, report.md and report.png.
    """

    def __init__(self, backbone: Backbone, settings: list[Setting], output: str = "output/evaluation") -> None:
        super().__init__()
        self.settings = settings
        self._check_points()
        self.output = Path(output)
        self.training_summary = _training_summary(backbone.adapter)
        if backbone.adapter is None:
            backbone.lora = None
        self.model, self.tokenizer = backbone.load(trainable=False)
        self.variants = ["before"] if backbone.adapter is None else ["before", "after"]
        self.cases = nn.ModuleDict(
            {
                _key(variant, metric, press, ratio): CaseValues()
                for variant in self.variants
                for metric in ("needle_accuracy", "perplexity")
                for press, ratio in self._points()
            }
        )

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Check that every press can look at contexts of this length."""
        context_tokens = getattr(self.trainer.datamodule, "context_tokens", None)  # type: ignore[attr-defined]
        for setting in self.settings:
            if context_tokens is not None and context_tokens <= observation_window(setting.press):
                raise ValueError(
                    f"{press_name(setting.press)} looks at a window of {observation_window(setting.press)} tokens but "
                    f"contexts have {context_tokens}: use longer contexts or a smaller window_size"
                )

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure one batch of text windows or of needles at every point, before and after."""
        metric = "perplexity" if batch["tasks"][0] == "text" else "needle_accuracy"
        index = self._batch_number(batch_idx) * 2**20 + torch.arange(len(batch["labels"]), device=self.device)
        for variant in self.variants:
            with self._variant(variant):
                recorded = RecordedPrefill(causal_lm(self.model), batch["context_ids"])
                for press, ratio in self._points():
                    value, count = self._measure(recorded, batch, press, ratio, metric)
                    cases = self.cases[_key(variant, metric, press, ratio)]
                    assert isinstance(cases, CaseValues)
                    cases.update(index, value, count)

    def on_test_end(self) -> None:
        """Write the report and print the table."""
        rows = list(self._rows())  # on every rank: they gather each other's cases
        if not self.trainer.is_global_zero or not rows:
            return
        from rich.console import Console

        paths = write_report(self.output, rows, self.training_summary, environment())
        console = Console()
        console.print(terminal_table(rows))
        console.print("report: " + ", ".join(str(path) for path in paths), soft_wrap=True)

    def _batch_number(self, batch_idx: int) -> int:
        """The batch's place in the data. Ranks take turns, and the last turn begins anew to give every rank a batch."""
        batches = len(self.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
        return (batch_idx * self.trainer.world_size + self.trainer.global_rank) % batches

    def _points(self) -> Iterator[tuple[BasePress | None, float]]:
        yield None, 0.0
        for setting in self.settings:
            for ratio in setting.compression_ratios:
                yield setting.press, ratio

    def _check_points(self) -> None:
        names = [(press_name(press), ratio) for press, ratio in self._points()]
        for name, ratio in names:
            if names.count((name, ratio)) > 1:
                raise ValueError(
                    f"settings has {name} at {ratio} more than once: its rows could not be told apart; "
                    "remove one, or measure it in a run of its own"
                )

    def _variant(self, variant: str) -> AbstractContextManager[Any]:
        return adapter_off(self.model) if variant == "before" else nullcontext()

    def _measure(
        self, recorded: RecordedPrefill, batch: Batch, press: BasePress | None, ratio: float, metric: str
    ) -> tuple[Tensor, Tensor]:
        """Per row: (is the answer right, 1), or (summed nll, tokens)."""
        if press is not None:
            set_compression_ratio(press, ratio)
        prefilled = recorded.evicted(press)
        hidden = continue_from(recorded.model, batch["continuation_ids"], prefilled.cache, prefilled.next_position)
        labels = batch["labels"][:, 1:]
        supervised = labels != IGNORE
        head = recorded.model.get_output_embeddings().weight
        if metric == "needle_accuracy":
            right = torch.ones_like(supervised)
            right[supervised] = most_likely(hidden[:, :-1][supervised], head) == labels[supervised]
            return right.all(1), torch.ones(len(labels), dtype=torch.int64, device=labels.device)
        nll = torch.zeros(labels.shape, device=labels.device)
        nll[supervised] = token_nll(hidden[:, :-1][supervised], head, labels[supervised])
        return nll.sum(1), supervised.sum(1)

    def _rows(self) -> Iterator[Row]:
        seen = set(self.training_summary.get("presses", []))
        for metric in ("needle_accuracy", "perplexity"):
            for press, ratio in self._points():
                results = [
                    self._score(self.cases[_key(variant, metric, press, ratio)], metric) for variant in self.variants
                ]
                if results[0] is None:
                    continue
                before, after = results[0], results[1] if len(results) > 1 else None
                yield Row(
                    press=press_name(press),
                    compression_ratio=ratio,
                    seen_in_training=press_name(press) in seen,
                    metric=metric,
                    before=before[0],
                    after=after[0] if after else None,
                    before_interval=before[1],
                    after_interval=after[1] if after else None,
                    cases=before[2],
                )

    @staticmethod
    def _score(cases: nn.Module, metric: str) -> tuple[float, tuple[float, float], int] | None:
        values, counts = cases.compute()  # type: ignore[operator]
        if not len(values):
            return None
        if metric == "needle_accuracy":
            right = int(values.sum())
            return right / len(values), wilson_interval(right, len(values)), len(values)
        perplexity = float((values.sum() / counts.sum()).exp())
        return perplexity, perplexity_interval(values.tolist(), counts.tolist()), len(values)


def most_likely(hidden_NE: Tensor, head_weight_VE: Tensor) -> Tensor:
    """(N,) token ids. In float32: bfloat16 logits tie, and a tie is no verdict."""
    with torch.autocast(hidden_NE.device.type, enabled=False):
        return (hidden_NE.float() @ head_weight_VE.float().T).argmax(-1)


def _key(variant: str, metric: str, press: BasePress | None, ratio: float) -> str:
    return f"{variant}/{metric}/{press_name(press)}/{ratio}".replace(".", "_")


def _training_summary(adapter: str | None) -> dict[str, Any]:
    """What the adapter's training run wrote about itself."""
    if adapter is None:
        return {}
    path = Path(adapter) / TRAINING_SUMMARY
    return json.loads(path.read_text()) if path.exists() else {}
