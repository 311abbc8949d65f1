"""Collecting queries, keys and values of whole contexts on disk while the model computes them."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import DynamicCache

from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.blocksparse.tensor_capture import DEFAULT_STATISTICS, MEASURES, TensorCapture, disk_need
from sparsekv_pl.evaluation.model_analysis import Analysis
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.models.native_precision import dtype_of
from sparsekv_pl.reporting import sparsity_figure, write_analysis
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.file_formats import json_bytes
from sparsekv_pl.reporting.page import Section, Table
from sparsekv_pl.storage.records import Record, Results, grouped


class TensorCollection(Analysis):
    """Writes Q, K, V of every layer of every context to ``output``, and a summary per length.

    The data decides contexts and samples: ``data.lengths``, and ``data.windows`` text windows of each (or retrieval
    cases); the nth case of a length is sample n. With ``backbone.adapter`` only the trained model's tensors are
    collected, because file names do not include the model. Use a second run with another output for the base model.

    A run that was killed, or whose files were removed, collects only what is missing. Raises ``ValueError`` for layers
    that the model does not have, and for attention that Q, K and V alone do not determine.

    Parameters
    ----------
    backbone
        The model.
    output
        Folder for the tensor files, summaries and the report; null: where the run's name says, else output/collect.
    layers
        Layers to write; null: all. Sketch&Walk uses all previous layers and is best tested on all of them.
    statistics
        Settings of the attention statistics in the summaries; null: the last 256 queries.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str | None = None,
        layers: list[int] | None = None,
        statistics: StatisticsSettings | None = None,
    ) -> None:
        super().__init__(backbone, output or "output/collect", trained_alone=True)
        self.statistics = statistics or DEFAULT_STATISTICS
        path = model_path(backbone.pretrained, backbone.adapter)
        self.capture = TensorCapture(self.output, self.causal_lm, path, layers, self.statistics)
        self.timestamps = Timestamps()

    def described(self) -> dict[str, Any]:
        return {"layers": self.capture.layers, "statistics": vars(self.statistics)}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.results = CollectedResults(self.output, self.global_rank)
        self.capture.folder, self.capture.rank = self.output, self.global_rank

    def on_predict_start(self) -> None:
        """Number the samples, and print the disk space that they need. Raises ValueError if it is not free."""
        cases = self.trainer.predict_dataloaders.dataset  # type: ignore[union-attr]
        variant = next(iter(self.variants))
        seen, missing = Counter[int](), Counter[int]()
        self.samples: dict[str, int] = {}
        for batch in (cases[i] for i in range(len(cases))):
            length = batch["context_ids"].shape[1]
            for case in batch["cases"]:
                self.samples[case.id] = seen[length]
                seen[length] += 1
            if any(self.results.get(piece.key) is None for piece in self.pieces(batch, variant)):
                missing[length] += len(batch["cases"])
        dtype = attention_dtype(self.causal_lm, str(self.trainer.precision))
        need = disk_need(self.output, self.causal_lm, missing, self.capture.layers, dtype)
        if self.trainer.is_global_zero:
            show("to collect: " + need)

    def measure(self, batch: CaseBatch) -> list[Record]:
        """Collect every row of the batch; return a record per layer and sample."""
        context = batch["context_ids"]
        rows = {row: self.samples[case.id] for row, case in enumerate(batch["cases"])}
        self.capture.begin(rows, self.timestamps.of(context.shape[1]))
        try:
            continue_from(self.causal_lm, context, DynamicCache(), 0, observer=self.capture)
            return self.capture.finish()
        finally:
            self.capture.discard()

    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        figures = {f"attention_seq{n}.png": (f"Attention, {n} tokens", f) for n, f in _figures(records).items()}
        overview = Section("What was collected", tables=[_table(records)], paragraphs=[_explained(self.statistics)])
        summaries = {name: json_bytes(content) for name, content in summaries_of(records, self.statistics).items()}
        content = {"summaries": sorted(summaries), "layers": self.capture.layers}
        return write_analysis(
            self.output, "Collected queries, keys and values", [overview], content, environment, figures, summaries
        )


class CollectedResults(Results):
    """Finished collections; one with missing files counts as not finished."""

    def __init__(self, output: Path, rank: int) -> None:
        super().__init__(output / "results", rank)
        self.output = output

    def get(self, key: str) -> list[Record] | None:
        found = super().get(key)
        there = found is not None and all((self.output / record["file"]).exists() for record in found)
        return found if there else None


class Timestamps:
    """Start time of each length's collection, YYYYMMDD_HHMMSS, shared by its files."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._known: dict[int, str] = {}

    def of(self, length: int) -> str:
        """The length's start time: the time of the first call."""
        if length not in self._known:
            self._known[length] = time.strftime("%Y%m%d_%H%M%S", time.localtime(self.clock()))
        return self._known[length]


def model_path(pretrained: str, adapter: str | None) -> str:
    """A model's name in the metadata."""
    return pretrained if adapter is None else f"{pretrained} + {adapter}"


def attention_dtype(model: torch.nn.Module, precision: str) -> torch.dtype:
    """The dtype in which attention is computed: autocast's, or without it the weights'."""
    return getattr(torch, dtype_of(precision)) if precision.endswith("mixed") else model.dtype  # type: ignore[return-value]


def summaries_of(records: Sequence[Record], statistics: StatisticsSettings) -> dict[str, dict[str, Any]]:
    """summary_seq{length}_{timestamp}.json -> its content, for each length.

    The timestamp is the last sample's. Measures by layer are means over samples and query heads.
    """
    summaries = {}
    for length, own in sorted(grouped(records, "seq_len").items()):
        by_layer = {
            str(layer): {name: float(np.mean([record[name] for record in some])) for name in MEASURES}
            for layer, some in sorted(grouped(own, "layer").items())
        }
        timestamp = max(record["timestamp"] for record in own)
        summaries[f"summary_seq{length}_{timestamp}.json"] = {
            "seq_len": length,
            "timestamp": timestamp,
            "model_path": sorted({record["model_path"] for record in own}),
            "dtype": sorted({record["dtype"] for record in own}),
            "num_samples": _samples(own),
            "samples": sorted({record["sample"] for record in own}),
            "layers": sorted({record["layer"] for record in own}),
            "num_files": len(own),
            "bytes": sum(record["bytes"] for record in own),
            "statistics": vars(statistics),
            "mean": {name: float(np.mean([layer[name] for layer in by_layer.values()])) for name in MEASURES},
            "by_layer": by_layer,
            "files": sorted(record["file"] for record in own),
        }
    return summaries


def _figures(records: Sequence[Record]) -> dict[int, Figure]:
    """Length -> heat maps of layer x head, averaged over samples."""
    figures = {}
    for length, own in sorted(grouped(records, "seq_len").items()):
        layers = [some for _, some in sorted(grouped(own, "layer").items())]
        means = {name: [np.mean([record[name] for record in some], axis=0) for some in layers] for name in MEASURES}
        figures[length] = sparsity_figure(
            {name.replace("_", " "): np.array(grid) for name, grid in means.items()},
            numbers=sorted({record["layer"] for record in own}),
        )
    return figures


def _table(records: Sequence[Record]) -> Table:
    lines = []
    for length, own in sorted(grouped(records, "seq_len").items()):
        counts = _samples(own), len({record["layer"] for record in own})
        size = sum(record["bytes"] for record in own) / 2**20
        means = [np.mean([record[name] for record in own]) for name in MEASURES]
        lines.append([str(length), *map(str, counts), str(len(own)), f"{size:.1f}", *(f"{mean:.3f}" for mean in means)])
    return Table(["tokens", "samples", "layers", "files", "MiB", *(name.replace("_", " ") for name in MEASURES)], lines)


def _samples(records: Sequence[Record]) -> int:
    """Number of samples. Runs on other data reuse sample numbers, but have another timestamp."""
    return len({(record["sample"], record["timestamp"]) for record in records})


def _explained(settings: StatisticsSettings) -> str:
    queries = "all queries" if settings.window is None else f"the last {settings.window} queries"
    return (
        f"Means over {queries}, all heads, layers and samples. Block sparsity: share of the visible blocks of "
        f"{settings.block_size} keys that get less than {settings.block_threshold:.0%} of a query's attention. "
        "Effective support: exp(entropy), the number of keys over which equal attention has the same entropy. Top-k "
        f"coverage: share of attention on the {settings.top_k} heaviest keys. In the pictures, layer 0 is the first "
        "collected layer."
    )
