"""The LightningModule that measures what a model keeps under eviction, base and trained, on the same cases."""

import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import set_parsing_settings
from kvpress import BasePress
from torch import nn

from sparsekv_pl.adapter import seen_in_training, training_summary, variants_of
from sparsekv_pl.backbone import Backbone, adapter_off, causal_lm
from sparsekv_pl.batch import TEXT, CaseBatch
from sparsekv_pl.eviction.limits import check_positions
from sparsekv_pl.eviction.press_fit import check_press
from sparsekv_pl.eviction.setting import Point, Setting, points_of
from sparsekv_pl.keys import batch_of, computed_by, key_of
from sparsekv_pl.measures import Measurement
from sparsekv_pl.measures.sparsity import LABELS, attention_sparsity
from sparsekv_pl.metrics import PerplexityAndKL, RetrievalScores
from sparsekv_pl.native_precision import warn_of_emulation
from sparsekv_pl.pieces import piece_done
from sparsekv_pl.reporting import run_environment, sparsity_figure, terminal_table, write_kvpress_layout, write_run
from sparsekv_pl.reporting.console import show, show_report
from sparsekv_pl.reporting.files import json_bytes, replace_all
from sparsekv_pl.reporting.loggers import log_scores
from sparsekv_pl.results import Record, Results, gathered
from sparsekv_pl.run_output import WritesOutput
from sparsekv_pl.user_errors import log_failure

set_parsing_settings(subclasses_enabled=[BasePress])

log = logging.getLogger(__name__)


class EvaluationModule(WritesOutput):
    """Retrieval, perplexity and KL with the full cache and under each press and ratio, with what each costs.

    Finished work is kept in ``output/results`` and not done again: a run that was killed, or that is given one press
    more, measures what is missing.

    Parameters
    ----------
    backbone
        The model; with ``backbone.adapter`` every case is measured twice, with the adapter off (base) and on (trained).
    settings
        Presses and ratios. The full cache is always measured.
    output
        Folder for the report, its pictures and tables, and the finished work.
        Null: where the run's name says, else output/evaluation.
    title
        Of the report.
    stability
        Also measure, on text, whether what a press keeps stays important (metrics/stability.py).
    sparsity
        Also measure, on text, how sparse attention is, by layer and head (metrics/sparsity.py).
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: list[Setting],
        output: str | None = None,
        title: str = "Base against trained",
        stability: bool = False,
        sparsity: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.points = settings, points_of(settings)
        self.output, self.title = Path(output or "output/evaluation").expanduser(), title
        self.stability, self.sparsity = stability, sparsity
        self.training_summary = training_summary(backbone.adapter)
        self.model, self.tokenizer = backbone.load(trainable=False)
        for setting in settings:
            check_press(causal_lm(self.model), setting.press)
        self.adapter, self.base, self.identity = backbone.adapter, backbone.described(), backbone.identity()
        self.variants = variants_of(backbone.adapter)
        names = [_name(variant, point) for variant in self.variants for point in self.points]
        self.retrieval = nn.ModuleDict({name: RetrievalScores() for name in names})
        self.text = nn.ModuleDict({name: PerplexityAndKL() for name in names})
        self.unfit = {point.name: why for point in self.points if (why := point.unfit())}
        self.failed: set[str] = set()

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Check that model and presses can take contexts of these lengths, and read what is finished already."""
        for length in getattr(self.trainer.datamodule, "lengths", []):  # type: ignore[attr-defined]
            check_positions(causal_lm(self.model), length, length, rotates=False)
            for setting in self.settings:
                setting.check(length)
        warn_of_emulation(self.trainer)
        self._check_text()
        self._compare_splits()
        self.results = Results(self.output / "results", self.global_rank)
        self.records: list[Record] = []
        self.sparsities: list[Record] = []
        self.started = time.time()

    def _check_text(self) -> None:
        if getattr(self.trainer.datamodule, "has_text", True):  # type: ignore[attr-defined]
            return
        for point in self.points:
            if point.decoding_interval is not None:
                raise ValueError(
                    f"{point.press_name} has decoding_interval={point.decoding_interval}, and the data has no text to "
                    "read while it evicts: set data.windows, or leave decoding_interval out"
                )

    def _compare_splits(self) -> None:
        splits = getattr(self.trainer.datamodule, "splits", None)  # type: ignore[attr-defined]
        if splits is None or not self.training_summary:
            return
        own, trained = asdict(splits), self.training_summary.get("splits")
        if own != trained:
            log.warning(
                "the data is divided by %s, and %s was trained on a division by %s: of the same text it may have seen "
                "what is held out here; give the splits that it was trained with",
                own,
                self.adapter,
                trained or "document names, as before splits followed from the text",
            )

    def test_step(self, batch: CaseBatch, batch_idx: int) -> None:
        """Measure one batch at every point, base and trained."""
        if batch_idx * self.trainer.world_size + self.global_rank >= self._batches():
            return  # ranks take turns, and the last turn begins anew to give every rank a batch
        for turn, variant in enumerate(self.variants):
            with self._variant(variant):
                measurement = Measurement(causal_lm(self.model), self.tokenizer, batch, self.stability)
                if self.sparsity and measurement.is_text:
                    self._add_sparsity(variant, batch)
                for number, point in enumerate(self.points, turn * len(self.points) + 1):
                    if point.decoding_interval is None or measurement.is_text:
                        self._add(variant, point, self._piece(measurement, variant, point))
                    piece_done(self, number, len(self.variants) * len(self.points))

    def on_test_end(self) -> None:
        """Write the report and print the table."""
        for name in self.text:
            scores = self.retrieval[name].compute() | self.text[name].compute()  # type: ignore[operator]
            known = {f"{name}/{key}": float(value) for key, value in scores.items() if not value.isnan()}
            log_scores(self.loggers, known)  # a metric that was given nothing is NaN
        records, sparsities = gathered(self.records), gathered(self.sparsities)
        if not self.trainer.is_global_zero or not records:
            return
        measured = run_environment(self, self.started, dtype=self.identity["dtype"])
        sparsity = self._sparsity(sparsities)
        figures = {f"Attention sparsity, {variant}": sparsity_figure(means) for variant, means in sparsity.items()}
        paths = write_run(self.output, records, self.training_summary, measured, self.title, figures)
        query_aware = bool(getattr(self.trainer.datamodule, "query_aware", False))  # type: ignore[attr-defined]
        write_kvpress_layout(
            self.output / "kvpress",
            records,
            str(self.base["pretrained"]),
            self.adapter,
            query_aware,
        )
        if sparsity:
            paths += replace_all(self.output, {"sparsity.json": json_bytes(sparsity)})
        show(terminal_table(records))
        show_report(paths, self.loggers)

    def _batches(self) -> int:
        return len(self.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]

    def _variant(self, variant: str) -> AbstractContextManager[Any]:
        return adapter_off(self.model) if variant == "base" else nullcontext()

    def _piece(self, measurement: Measurement, variant: str, point: Point) -> list[Record]:
        """A batch's records at one point: from disk if they are there, else measured and kept."""
        batch = measurement.batch
        where = {
            "length": batch["context_ids"].shape[1],
            "variant": variant,
            "press": point.press_name,
            "compression_ratio": point.compression_ratio,
            "prefill": point.prefill,
            "seen_in_training": seen_in_training(point.press, self.training_summary),
        }
        who = [{"case": c.id, "task": c.task, "depth": c.depth, "seed": c.seed} | where for c in batch["cases"]]
        key = None if point.name in self.unfit else self._key_at(measurement, variant, point)
        found = None if key is None else self.results.get(key)
        if found is None:
            found = self._measured(measurement, variant, point)
            if found is None:
                return []
            if key is not None and "error" not in found[0]:
                self.results.put(key, found, _name(variant, point))
        return [case | record for case, record in zip(who, found, strict=False)]

    def _add_sparsity(self, variant: str, batch: CaseBatch) -> None:
        key = self._key(batch, variant, "sparsity")
        found = self.results.get(key)
        if found is None:
            found = [attention_sparsity(causal_lm(self.model), self.tokenizer, batch["context_ids"])]
            self.results.put(key, found, f"{variant}_sparsity")
        self.sparsities.append({"variant": variant, "cases": len(batch["cases"]), **found[0]})

    def _sparsity(self, parts: list[Record]) -> dict[str, dict[str, Any]]:
        """Variant -> measure -> (layers, heads), means over all batches."""
        means = {}
        for variant in self.variants:
            own = [part for part in parts if part["variant"] == variant]
            if own:
                weights = [part["cases"] for part in own]
                means[variant] = {
                    label: np.average([part[name] for part in own], axis=0, weights=weights).tolist()
                    for name, label in LABELS.items()
                }
        return means

    def _measured(self, measurement: Measurement, variant: str, point: Point) -> list[Record] | None:
        """None where this point failed before. A failure is reported and does not stop the others."""
        if _name(variant, point) in self.failed:
            return None
        if point.name in self.unfit:
            self.failed.add(_name(variant, point))
            return [{"error": self.unfit[point.name]}]
        try:
            return measurement.at(point)
        except Exception as error:
            log_failure(log, f"{point.press_name} at {point.compression_ratio}, {variant}", error)
            self.failed.add(_name(variant, point))
            return [{"error": f"{type(error).__name__}: {error}"}]

    def _key_at(self, measurement: Measurement, variant: str, point: Point) -> str:
        stability = {"stability": measurement.tells_stability(point)}
        return self._key(measurement.batch, variant, point.described() | stability)

    def _key(self, batch: CaseBatch, variant: str, measured: Any) -> str:
        return key_of(
            model=self.identity,
            adapter=self.variants[variant],
            computed_by=computed_by(self),
            measured=measured,
            batch=batch_of(batch, named=False),
        )

    def _add(self, variant: str, point: Point, records: Iterable[Record]) -> None:
        for record in records:
            self.records.append(record)
            if "error" not in record:
                metrics = self.text if record["task"] == TEXT else self.retrieval
                metrics[_name(variant, point)].update(record)  # type: ignore[operator]


def _name(variant: str, point: Point) -> str:
    return f"{variant}_{point.name}"
