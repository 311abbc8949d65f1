"""Collect Q, K, V tensors from the forwards of an evaluation."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from sparsekv_pl.attention.evicted_attention import CACHED, Observer
from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.blocksparse.collection import Timestamps, attention_dtype, model_path, summaries_of
from sparsekv_pl.blocksparse.tensor_capture import TensorCapture, disk_need
from sparsekv_pl.evaluation.run_output import RunOutput
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.file_formats import json_bytes, replace_all
from sparsekv_pl.storage.records import Record, gathered


class CollectTensors(pl.Callback):
    """Write the files of ``blocksparse.collection.TensorCollection`` in any ``evaluate.py test`` run of a model.

    Tensors come from dense forwards over a whole context of the batch (as many queries as keys), once per context, with
    the adapter on if there is one. An evaluation in one chunk runs such a forward for every context; one in many
    chunks, or of a hosted model, runs none. Finished work on disk is not run again, so nothing is collected from it:
    use a fresh ``model.output``.

    Sample n is the nth case of a length, among those of ``tasks``.

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

    Raises
    ------
    ValueError
        If ``lengths`` is empty or ``samples`` below 1.
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
        self._handles: list[Any] = []
        self._waiting: dict[int, int] = {}
        self._context: Tensor | None = None
        self._running: set[int] = set()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the disk space that the files take, and hook into the model's forwards.

        Raises
        ------
        ValueError
            If the files do not fit on the disk, if the data has none of the lengths, or if the module has no model.
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
        self._add_hooks(pl_module.model, model)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: CaseBatch, batch_idx: int, *_: Any
    ) -> None:
        """Assign sample numbers to the batch's rows."""
        context = batch["context_ids"]
        self._context, self._waiting = context, {}
        if context.shape[1] not in self.lengths:
            return
        for row, case in enumerate(batch["cases"]):
            if self.tasks is None or case.task in self.tasks:
                sample = self._seen[context.shape[1]] * trainer.world_size + trainer.global_rank
                self._seen[context.shape[1]] += 1
                if sample < self.samples:
                    self._waiting[row] = sample

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write and print a summary of each length."""
        records = gathered(self.records)
        if not trainer.is_global_zero:
            return
        files = summaries_of(records, self.capture.statistics)
        paths = replace_all(self.folder, {name: json_bytes(content) for name, content in files.items()})
        outcome = f"collected {len(records)} tensor files in {self.folder}"
        if not records:
            outcome = (
                "collected no tensors: no whole context went through the model in one forward (see CollectTensors)"
            )
        show(", ".join([outcome, *map(str, paths)]))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks, also after an error."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._running = [], set()
        if hasattr(self, "capture"):
            self.capture.discard()

    def _add_hooks(self, wrapped: Any, model: PreTrainedModel) -> None:
        decoder = decoder_of(model)

        def begin(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            attention = model.config.get_text_config()._attn_implementation
            rows = self._rows(kwargs) if attention == CACHED and not _adapter_is_off(wrapped) else {}
            self._running = set(rows.values())
            if rows:
                self.capture.begin(rows, self.timestamps.of(kwargs["input_ids"].shape[1]))

        def end(*_: Any) -> None:
            if self._running:
                done, self._running = self._running, set()
                self.records += self.capture.finish()
                self._waiting = {row: sample for row, sample in self._waiting.items() if sample not in done}

        # On each layer's attention, after the evaluation's own keywords are set: a hook of the decoder would run before
        # the evaluation's hook and its observer would be replaced.
        self._handles = [decoder.register_forward_pre_hook(begin, with_kwargs=True)]
        for layer in self.capture.layers:
            attention = decoder.layers[layer].self_attn
            self._handles.append(attention.register_forward_pre_hook(self._observe, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(end))

    def _observe(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not self._running:
            return None
        observers = [self.capture, kwargs.get("observer")]
        return args, kwargs | {"observer": _all_of(observer for observer in observers if observer is not None)}

    def _rows(self, kwargs: dict[str, Any]) -> dict[int, int]:
        """Map the rows of a forward to samples, if it is over whole contexts that are still to be collected."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None or self._context is None or ids.shape[1] != self._context.shape[1]:
            return {}
        if cache is not None and cache.get_seq_length():
            return {}
        rows, free = {}, dict(self._waiting)
        for row, own in enumerate(ids):
            match = next((r for r in free if torch.equal(own, self._context[r])), None)
            if match is not None:
                rows[row] = free.pop(match)
        return rows


def _all_of(observers: Iterable[Observer]) -> Observer:
    every = list(observers)

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        for observer in every:
            observer(layer, query, key, value)

    return observe


def _adapter_is_off(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))
