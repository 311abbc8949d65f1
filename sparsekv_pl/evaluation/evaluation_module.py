"""The LightningModule that measures a model under eviction, base and trained, on the same cases."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jsonargparse import set_parsing_settings
from kvpress import BasePress

from sparsekv_pl.evaluation.batch_keys import batch_of
from sparsekv_pl.evaluation.case_view import case_views
from sparsekv_pl.evaluation.context_sparsity import LABELS, attention_sparsity
from sparsekv_pl.evaluation.kept_attention import keeps_attention, kept_attention
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.measuring_module import MeasuringModule, Piece
from sparsekv_pl.evaluation.points import Point, Setting, points_of
from sparsekv_pl.evaluation.recalled_words import RECENT_TOKENS
from sparsekv_pl.evaluation.view_pages import VIEWED_TOKENS, ViewedCases
from sparsekv_pl.eviction.limits import check_positions
from sparsekv_pl.eviction.press_model_check import check_press, check_press_alone
from sparsekv_pl.eviction.while_decoding import check_turns
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.presses.pressed_model import start
from sparsekv_pl.reporting import sparsity_figure, write_kvpress_layout
from sparsekv_pl.reporting.ceiling_maps import reached_figures, reached_of, reached_rows
from sparsekv_pl.reporting.file_formats import json_bytes, replace_all
from sparsekv_pl.storage.records import Record

set_parsing_settings(subclasses_enabled=[BasePress])

log = logging.getLogger(__name__)


class EvaluationModule(MeasuringModule):
    """Measures retrieval, perplexity, KL and cost with the full cache and under each press and ratio.

    Finished work is stored in ``output/results``: a run that was killed, or that gets one more press, measures only
    what is missing.

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
        Title of the report.
    stability
        Also measure, on text, whether the kept pairs stay important (metrics/eviction_stability.py).
    sparsity
        Also measure, on text, the sparsity of attention by layer and head (metrics/attention_sparsity.py).
    kept_attention
        Also measure, where the press evicts from the context alone, the share that it keeps of the attention that as
        many pairs could hold, by layer and KV head (kept_attention.py). Of plain text if there are no other cases.
    views
        Number of cases that the report links an eviction viewer of: which tokens each press kept. Cases of plain text
        are viewed if there are no others, contexts of more than 10,000 tokens never.
    card
        If there is an adapter, also write the tables into its README.md, in place of those of an earlier evaluation.

    Raises
    ------
    ValueError
        For two settings with equal names in a report, for a press that does not fit the model, and for fewer than 0
        views.
    """

    viewed_tokens: ClassVar[int | None] = VIEWED_TOKENS

    def __init__(
        self,
        backbone: Backbone,
        settings: list[Setting],
        output: str | None = None,
        title: str = "Base against trained",
        stability: bool = False,
        sparsity: bool = False,
        kept_attention: bool = False,
        views: int = 2,
        card: bool = False,
    ) -> None:
        self.viewed = ViewedCases(views, self.viewed_tokens)
        self.settings, self.points = settings, points_of(settings)
        for setting in settings:
            check_press_alone(setting.press, foresight=True)
        super().__init__(output or "output/evaluation", backbone)
        self.backbone: Backbone = backbone
        self.title, self.stability, self.sparsity, self.card = title, stability, sparsity, card
        self.kept_attention = kept_attention
        for setting in settings:
            check_press(self.causal_lm, setting.press, foresight=True)

    def setup(self, stage: str) -> None:
        """Check that model and presses support the data's context lengths, and read the finished work.

        Raises
        ------
        ValueError
            For a context that is too long for the model or does not fit a press, and for a card of cases not held out.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        split = getattr(data, "split", "held_out")
        if split != "held_out":
            if self.card:
                raise ValueError(
                    f"card: true publishes held-out results: with data.split {split} set model.card to false"
                )
            self.title = f"{self.title} ({split} cases)"
        check_turns((setting.decoding for setting in self.settings), getattr(data, "has_turns", False), "tasks")
        for length in getattr(data, "lengths", []):
            check_positions(self.causal_lm, length, length, rotates=False)
            for setting in self.settings:
                setting.check(length)
        self._compare_splits()
        super().setup(stage)

    def on_test_start(self) -> None:
        """Start every press, before the first is measured."""
        for setting in self.settings:
            start(self.causal_lm, setting.press)

    def _compare_splits(self) -> None:
        splits = getattr(self.trainer.datamodule, "splits", None)  # type: ignore[attr-defined]
        if splits is None or not self.training_summary:
            return
        own, trained = asdict(splits), self.training_summary.get("splits")
        if own != trained:
            log.warning(
                "the data is split by %s, but %s was trained on data split by %s: training may have seen text that is "
                "held out here; set data.splits to those of the training",
                own,
                self.backbone.adapter,
                trained or "document names (the rule of older versions)",
            )

    def pieces(self, batch: CaseBatch, variant: str) -> Iterator[Piece]:
        """One piece per point, sharing one prefill of the batch, and one for the sparsity of attention."""
        measurement = Measurement(self.causal_lm, self.tokenizer, batch, self.stability)
        if self.sparsity and measurement.is_text:
            yield self._sparsity_of(batch, variant)
        pieces = [self._piece(measurement, variant, point) for point in self.points]
        measurement.ahead = [point for point, piece in zip(self.points, pieces, strict=True) if self.is_left(piece)]
        yield from pieces
        if self.kept_attention and not self._is_beside(measurement):
            yield from (self._kept_of(measurement, variant, point) for point in self.points if keeps_attention(point))
        if rows := self._viewed_rows(measurement):
            yield self._views_of(measurement, variant, rows)

    def write(self, records: list[Record], environment: dict[str, Any]) -> list[Path]:
        """Write the report, kvpress's layout and what was measured of attention; print the table; return the paths."""
        cases = [record for record in records if "case" in record]
        sparsity = self._sparsity([record for record in records if LABELS.keys() <= record.keys()])
        layers = evicted_layers(self.causal_lm.config)
        figures = {
            f"Attention sparsity, {variant}": sparsity_figure(means, numbers=layers)
            for variant, means in sparsity.items()
        }
        reached = reached_of(record for record in records if "kept_attention" in record)
        figures |= {f"Attention kept, {press}": one for press, one in reached_figures(reached, layers)}
        card = self.card and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        paths = self.report_cases(cases, environment, figures, self.pages(records, self.viewed.count), card)
        query_aware = bool(getattr(self.trainer.datamodule, "query_aware", False))  # type: ignore[attr-defined]
        model, trained = str(self.base["pretrained"]), self.backbone.adapter
        write_kvpress_layout(self.output / "kvpress", cases, model, trained, query_aware)
        files = {"sparsity.json": json_bytes(sparsity | {"layers": layers})} if sparsity else {}
        if reached:
            files["kept_attention.json"] = json_bytes({"layers": layers, "points": list(reached_rows(reached))})
        return paths + replace_all(self.output, files)

    def _piece(self, measurement: Measurement, variant: str, point: Point) -> Piece:
        batch, unfit = measurement.batch, point.unfit()
        where = {"length": batch["context_ids"].shape[1], **self.columns(variant, point.condition, point.press)}
        cases = [{"case": c.id, "task": c.task, "depth": c.depth, "seed": c.seed} | where for c in batch["cases"]]
        return Piece(
            key="" if unfit else self._key(measurement, variant, point),
            file=f"{variant}_{point.name}",
            measure=lambda: measurement.at(point),
            columns=cases,
            label=f"{point.condition}, {variant}",
            unfit=unfit,
        )

    def _key(self, measurement: Measurement, variant: str, point: Point) -> str:
        measured = point.described() | {"stability": measurement.measures_stability(point)}
        if measurement.is_text:
            measured["recalled_words"] = RECENT_TOKENS
        return self.key(variant, measured=measured, batch=batch_of(measurement.batch, named=False))

    def _viewed_rows(self, measurement: Measurement) -> list[int]:
        return [] if self._is_beside(measurement) else self.viewed.rows(measurement.batch)

    def _is_beside(self, measurement: Measurement) -> bool:
        """Whether the batch is plain text beside tasks."""
        return measurement.is_text and bool(getattr(self.trainer.datamodule, "tasks", []))  # type: ignore[attr-defined]

    def _kept_of(self, measurement: Measurement, variant: str, point: Point) -> Piece:
        batch, unfit = measurement.batch, point.unfit()
        return Piece(
            key=""
            if unfit
            else self.key(
                variant, measured="kept attention", point=point.described(), batch=batch_of(batch, named=False)
            ),
            file=f"{variant}_{point.name}_attention",
            measure=lambda: [kept_attention(measurement, point)],
            columns=repeat({"variant": variant, **point.condition.columns()}),
            label=f"attention kept under {point.condition}, {variant}",
            unfit=unfit,
        )

    def _views_of(self, measurement: Measurement, variant: str, rows: list[int]) -> Piece:
        # a point with quantised pairs keeps those of the point without
        points = [point for point in self.points if not point.unfit() and point.quantisation is None]
        described = [point.described() | {"name": point.name} for point in points]
        batch = batch_of(measurement.batch, named=True)
        return Piece(
            key=self.key(variant, measured="views", rows=rows, points=described, batch=batch),
            file=f"{variant}_views",
            measure=lambda: case_views(measurement, points, rows, teacher=variant == "base"),
            columns=repeat({"variant": variant}),
            label=f"the viewer's cases, {variant}",
        )

    def _sparsity_of(self, batch: CaseBatch, variant: str) -> Piece:
        return Piece(
            key=self.key(variant, measured="sparsity", batch=batch_of(batch, named=False)),
            file=f"{variant}_sparsity",
            measure=lambda: [attention_sparsity(self.causal_lm, self.tokenizer, batch["context_ids"])],
            columns=repeat({"variant": variant, "cases": len(batch["cases"])}),
        )

    def _sparsity(self, parts: list[Record]) -> dict[str, dict[str, Any]]:
        """Variant -> measure -> (layers, H), means over all batches."""
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
