"""Attention statistics by layer and head, and the distribution of attention over the context."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.analysis.statistics_figures import statistics_figures
from sparsekv_pl.analysis.statistics_report import statistics_files, statistics_sections, summaries_of
from sparsekv_pl.attention.statistics import AttentionStatistics, LayerStatistics, StatisticsSettings
from sparsekv_pl.evaluation.model_analysis import Analysis
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.metrics.attention_sparsity import AttentionSparsity
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.reporting.analysis_page import write_analysis
from sparsekv_pl.reporting.console import show
from sparsekv_pl.storage.records import Record


class AttentionStatisticsAnalysis(Analysis):
    """Measures entropy, effective support, top-k coverage, block sparsity, anchor share, and each block's mass.

    One pass with the full cache over each context; continuations are not read. Raises ``ValueError`` if
    ``chunk_tokens`` is not a positive multiple of the statistics' ``query_block``.

    Parameters
    ----------
    backbone, output
        As in ``Analysis``.
    statistics
        Settings of the statistics; ``{window: 1}`` only measures the last query, at almost no cost beyond the pass.
    anchors
        Tokens whose share of the attention is measured; null: sinks, special tokens and punctuation. Recent tokens
        would be those before the context's end, not before each query.
    chunk_tokens
        Tokens of a context that run through the model at once, which limits the memory; null: all.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str | None = None,
        statistics: StatisticsSettings | None = None,
        anchors: Anchors | None = None,
        chunk_tokens: int | None = 1024,
    ) -> None:
        self.statistics = statistics or StatisticsSettings()
        block = self.statistics.query_block
        if chunk_tokens is not None and (chunk_tokens < 1 or chunk_tokens % block):
            raise ValueError(f"chunk_tokens={chunk_tokens} must be a positive multiple of query_block={block}, or null")
        super().__init__(backbone, output or "output/statistics")
        self.anchors, self.chunk_tokens = anchors or Anchors(recent=0), chunk_tokens

    def described(self) -> dict[str, Any]:
        """The settings that decide the results; tile sizes do not."""
        settings = asdict(self.statistics)
        return {
            "statistics": {name: value for name, value in settings.items() if not name.endswith("_tile")},
            "anchors": asdict(self.anchors),
            "chunk_tokens": self.chunk_tokens,
        }

    def measure(self, batch: CaseBatch) -> Sequence[Record]:
        """Measure a batch; return a record per context."""
        ids = batch["context_ids"]
        observer = AttentionStatistics(self.statistics, self.anchors.mask(ids, self.tokenizer))
        run_observed(self.causal_lm, ids, observer, self.chunk_tokens)
        layers = [observer.layers[layer] for layer in sorted(observer.layers)]
        return [
            {"id": case.id, "task": case.task, "length": ids.shape[1], **_row_record(layers, row, self.statistics)}
            for row, case in enumerate(batch["cases"])
        ]

    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        """Write report, pictures, and the figures of all layers and heads as CSV; return the paths."""
        summaries = summaries_of(records, self.statistics, evicted_layers(self.causal_lm.config))
        self._print(summaries)
        figures = statistics_figures(summaries, self.statistics)
        return write_analysis(
            self.output,
            "How attention is spread",
            statistics_sections(summaries, self.statistics),
            {**self.described(), "summaries": summaries},
            environment,
            figures,
            statistics_files(summaries),
        )

    def _print(self, summaries: list[dict[str, Any]]) -> None:
        for summary in summaries:
            figures = [
                f"{row['label']} {' -> '.join(f'{value:.3g}' for value in row['means'].values())}"
                for row in summary["overall"]
            ]
            head = f"{summary['task']}, {summary['length']} tokens, {' -> '.join(summary['variants'])}"
            show(f"{head}: {'; '.join(figures)}")


def run_observed(
    model: PreTrainedModel, ids: Tensor, observer: AttentionStatistics, chunk_tokens: int | None = None
) -> None:
    """Run ``ids`` (B, L) through ``model`` in chunks; the last one is longer if the statistics' window needs it."""
    length, window, cache = ids.shape[1], observer.settings.window or 1, DynamicCache()
    starts = [start for start in range(0, length, chunk_tokens or length) if not start or length - start >= window]
    for start, stop in pairwise([*starts, length]):
        continue_from(model, ids[:, start:stop], cache, start, observer=observer)


def _row_record(layers: Sequence[LayerStatistics], row: int, settings: StatisticsSettings) -> Record:
    """One row's measures, (layers, H) each, and (layers, blocks), the share of the mass in each block."""
    own = [_row(measured, row) for measured in layers]
    metric = AttentionSparsity(len(own), own[0].entropy.shape[1]).to(own[0].entropy.device)
    for layer, measured in enumerate(own):
        metric.update(layer, measured)
    entropy = stacked([measured.mean(measured.entropy)[0] for measured in own])
    received = stacked([m.received_by_block(settings.block_size)[0] / m.entropy.shape[-1] for m in own])
    return {
        "measures": {
            "entropy": entropy.tolist(),
            **{name: values.tolist() for name, values in metric.compute().items()},
            "first_block_share": received[..., 0].tolist(),
        },
        "received": received.mean(1).tolist(),
    }


def _row(measured: LayerStatistics, row: int) -> LayerStatistics:
    return replace(measured, **{field.name: getattr(measured, field.name)[row : row + 1] for field in fields(measured)})
