"""Collects Q, K, V while an evaluation runs, from the forwards that it runs anyway."""

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
    """Writes the files of ``blocksparse.collection.TensorCollection`` in any ``evaluate.py test`` run of a model.

    Looked at are dense forwards over a whole context of the batch (as many queries as keys), each context once, with
    the adapter on where there is one: the trained model, not the base. An evaluation in one chunk runs such a forward
    for every context; one in many chunks, or that a hosted model answers, runs none. What an evaluation finds finished
    on disk it does not run, so nothing is collected from it: begin with a fresh ``model.output``.

    The nth case of a length, among those of ``tasks``, is sample n.

    Parameters
    ----------
    output
        Folder for the tensor files and summaries.
    lengths
        Context lengths to collect, in tokens.
    layers
        Layers to write; null for all.
    samples
        Of each length, the first so many.
    tasks
        Tasks to collect, as the data names them ("text", "facts"); null for all. Text windows come first.
    statistics
        What the summaries say of attention; null for the last 256 queries.
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
        """Say what the files will take of the disk, and look at the model's forwards from now on.

        Raises
        ------
        ValueError
            If it does not fit, if the data has none of the lengths, or if the module has no model.
        """
        if not hasattr(pl_module, "model"):
            raise ValueError(f"CollectTensors needs a model of its own, which {type(pl_module).__name__} has not")
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
        told = disk_need(self.folder, model, dict.fromkeys(lengths, self.samples), self.capture.layers, dtype)
        if trainer.is_global_zero:
            show("to collect at most: " + told)
        self._look_at(pl_module.model, model)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: CaseBatch, batch_idx: int, *_: Any
    ) -> None:
        """Number the batch's samples."""
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
        """Write a summary of each length."""
        records = gathered(self.records)
        if not trainer.is_global_zero:
            return
        files = summaries_of(records, self.capture.statistics)
        paths = replace_all(self.folder, {name: json_bytes(content) for name, content in files.items()})
        told = f"collected {len(records)} tensor files in {self.folder}"
        if not records:
            told = "collected no tensors: no whole context went through the model in one forward (see CollectTensors)"
        show(", ".join([told, *map(str, paths)]))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model, also after an error."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._running = [], set()
        if hasattr(self, "capture"):
            self.capture.discard()

    def _look_at(self, wrapped: Any, model: PreTrainedModel) -> None:
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

        # Beside each layer's attention, where what the evaluation itself passes has arrived: a hook of the decoder
        # would run before the evaluation's own and take the place of its observer.
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
        """Row -> sample, of a forward over whole contexts that are still to be collected."""
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
