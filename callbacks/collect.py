"""Collect Q, K, V tensors from the forwards of an evaluation."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import DynamicCache
from typing_extensions import override

from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.blocksparse.collection import Timestamps, attention_dtype, model_path, summaries_of
from sparsekv_pl.blocksparse.tensor_capture import TensorCapture, disk_need
from sparsekv_pl.evaluation.run_output import RunOutput
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.file_formats import json_bytes, replace_all
from sparsekv_pl.storage.records import Record, gathered


class CollectTensors(pl.Callback):
    """Write the files of ``blocksparse.collection.TensorCollection`` in any ``evaluate.py test`` run of a model.

    Before a batch is evaluated, its contexts that are still to be collected run once through the model, whole and with
    the adapter on if there is one: also where the evaluation itself runs in chunks, or finds finished work on disk.

    Sample n is the nth case of a length, among those of ``tasks``. Raises ``ValueError`` if ``lengths`` is empty or
    ``samples`` below 1.

    Parameters
    ----------
    output
        Folder for the tensor files and summaries.
    lengths
        Context lengths to collect, in tokens.
    layers
        Layers to write; null for all.
    samples
        Most samples of each length.
    tasks
        Tasks to collect, as the data names them ("text", "facts"); null for all. Text windows come first.
    statistics
        Settings of the attention statistics in the summaries; null measures the last 256 queries.
    """

    def __init__(
        self,
        output: str = "output/collect",
        lengths: Sequence[int] = (4096, 8192, 16384),
        layers: list[int] | None = None,
        samples: int = 5,
        tasks: list[str] | None = None,
        statistics: StatisticsSettings | None = None,
    ) -> None:
        if samples < 1 or not lengths:
            raise ValueError(f"samples={samples}, lengths={list(lengths)} collect nothing: give at least one of each")
        self.output, self.lengths, self.layers, self.samples = RunOutput(output), list(lengths), layers, samples
        self.tasks, self.statistics = tasks, statistics
        self.timestamps = Timestamps()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the disk space that the files take.

        Raises ``ValueError`` if the files do not fit on the disk, if the data has none of the lengths, or if the module
        has no model.
        """
        if not hasattr(pl_module, "model"):
            raise ValueError(f"CollectTensors needs a module with a model, which {type(pl_module).__name__} has not")
        model = causal_lm(pl_module.model)
        offered = getattr(trainer.datamodule, "lengths", self.lengths)  # type: ignore[attr-defined]
        lengths = [length for length in self.lengths if length in offered]
        if not lengths:
            raise ValueError(f"CollectTensors.lengths={self.lengths}, but the data has {offered}: give one of these")
        backbone = getattr(pl_module, "backbone", None)
        path = "" if backbone is None else model_path(backbone.pretrained, backbone.adapter)
        self.folder = self.output.of(trainer)
        self.capture = TensorCapture(self.folder, model, path, self.layers, self.statistics)
        self.capture.rank = trainer.global_rank
        self.records: list[Record] = []
        self._seen = Counter[int]()
        dtype = attention_dtype(model, str(trainer.precision))
        need = disk_need(self.folder, model, dict.fromkeys(lengths, self.samples), self.capture.layers, dtype)
        if trainer.is_global_zero:
            show("to collect at most: " + need)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: CaseBatch, batch_idx: int, *_: Any
    ) -> None:
        """Collect the batch's contexts that are still wanted, in one forward."""
        context, rows = batch["context_ids"], self._rows(trainer, batch)
        if not rows:
            return
        model = causal_lm(pl_module.model)
        ids = context[list(rows)].to(model.get_input_embeddings().weight.device)  # type: ignore[arg-type]
        self.capture.begin(dict(enumerate(rows.values())), self.timestamps.of(context.shape[1]))
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                continue_from(model, ids, DynamicCache(), 0, observer=self.capture)
            self.records += self.capture.finish()
        finally:
            self.capture.discard()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write and print a summary of each length."""
        records = gathered(self.records)
        if not trainer.is_global_zero:
            return
        files = summaries_of(records, self.capture.statistics)
        paths = replace_all(self.folder, {name: json_bytes(content) for name, content in files.items()})
        show(", ".join([f"collected {len(records)} tensor files in {self.folder}", *map(str, paths)]))

    def _rows(self, trainer: pl.Trainer, batch: CaseBatch) -> dict[int, int]:
        """Number the batch's cases of a wanted length and task; return row -> sample for those still wanted."""
        (contexts, length), rows = batch["context_ids"].shape, {}
        for row, case in enumerate(batch["cases"][:contexts]):  # cases of a long haystack share one context
            if length in self.lengths and (self.tasks is None or case.task in self.tasks):
                sample = self._seen[length] * trainer.world_size + trainer.global_rank
                self._seen[length] += 1
                if sample < self.samples:
                    rows[row] = sample
        return rows
