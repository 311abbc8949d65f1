"""Writing the queries, keys and values of a forward to disk layer by layer, without keeping them in memory."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.attention.statistics import StatisticsSettings, attention_statistics
from sparsekv_pl.blocksparse.tensor_format import LayerTensors, Metadata, file_name, write
from sparsekv_pl.models.cache_shape import cache_shape
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.storage.whole_files import free_bytes

MEASURES = ("block_sparsity", "effective_support", "top_k_coverage")
"""Measures recorded for each layer; see ``LayerStatistics``."""
DEFAULT_STATISTICS = StatisticsSettings(window=256)
"""Statistics over the last 256 queries; over all queries they would take longer than the forward."""


class TensorCapture:
    """An ``Observer`` (evicted_attention.py) of dense forwards over whole contexts, one forward at a time.

    Call ``begin``, run the forward with ``observer=capture``, then call ``finish``. A sample's files appear in
    ``folder`` together, after all of its layers are written; a forward that fails leaves none. Set ``rank`` if several
    processes write to one folder. ``layers`` of None are all; ``statistics`` of None are ``DEFAULT_STATISTICS``. Raises
    ``ValueError`` for layers that the model does not have, and for attention that Q, K and V alone do not determine.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        model_path: str,
        layers: Sequence[int] | None = None,
        statistics: StatisticsSettings | None = None,
    ) -> None:
        self.folder, self.model_path = folder, model_path
        self.layers = chosen_layers(model, layers)
        self.hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
        self.statistics = statistics or DEFAULT_STATISTICS
        self.rank = 0
        self._rows: dict[int, int] = {}
        self._timestamp = ""
        self._records: list[dict[str, Any]] = []

    @property
    def _unfinished(self) -> Path:
        return self.folder / f".unfinished.{self.rank}"

    def begin(self, rows: Mapping[int, int], timestamp: str) -> None:
        """Prepare for a forward whose row r is sample ``rows[r]``; other rows are not written."""
        self.discard()
        self._unfinished.mkdir(parents=True)
        self._rows, self._timestamp, self._records = dict(rows), timestamp, []

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Write one layer of queries (B, H, L, D), keys and values (B, K, L, D)."""
        if layer not in self.layers:
            return
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{query.shape[2]} queries over {key.shape[2]} keys are not a dense forward over a whole context: "
                "collect without chunks and before anything is evicted"
            )
        for row, sample in self._rows.items():
            own = [tensor[row : row + 1] for tensor in (query, key, value)]
            self._write(layer, sample, *own)

    def finish(self) -> list[dict[str, Any]]:
        """Move the files to ``folder``; return a record per file, with measures by head (H,), averaged over queries.

        Raises ``ValueError`` if the forward did not reach all layers.
        """
        seen = Counter(record["sample"] for record in self._records)
        if any(seen[sample] != len(self.layers) for sample in self._rows.values()):
            raise ValueError(
                f"the forward showed {sorted({r['layer'] for r in self._records})} of the layers {self.layers}: "
                "collect layers that compute attention, and run the model with attention/evicted_attention.py"
            )
        for record in self._records:
            (self._unfinished / record["file"]).replace(self.folder / record["file"])
        records = self._records
        self.discard()
        return records

    def discard(self) -> None:
        """Delete the files of a forward that did not finish."""
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._rows, self._records = {}, []

    def _write(self, layer: int, sample: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        _, heads, length, dim = query.shape
        metadata = Metadata(
            layer_idx=layer,
            seq_len=length,
            num_heads=heads,
            num_kv_heads=key.shape[1],
            head_dim=dim,
            hidden_size=self.hidden_size,
            batch_size=1,
            timestamp=self._timestamp,
            model_path=self.model_path,
        )
        path = write(self._unfinished, sample, LayerTensors(query, key, value, metadata))
        measured = attention_statistics(query, key, self.statistics)
        means = {name: measured.mean(getattr(measured, name))[0].tolist() for name in MEASURES}
        record = {
            "file": file_name(metadata, sample),
            "seq_len": length,
            "layer": layer,
            "sample": sample,
            "timestamp": self._timestamp,
            "model_path": self.model_path,
            "dtype": str(query.dtype).removeprefix("torch."),
            "bytes": path.stat().st_size,
        }
        self._records.append(record | means)


def chosen_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> list[int]:
    """Check and sort the layers to write.

    Raises ``ValueError`` for layers that the model does not have, and for attention that Q, K and V alone do not
    determine.
    """
    stack = decoder_of(model).layers
    chosen = list(range(len(stack))) if layers is None else sorted(set(layers))
    wrong = [layer for layer in chosen if not 0 <= layer < len(stack)]
    if wrong or not chosen:
        raise ValueError(
            f"layers={layers} asks for {wrong or 'nothing'}: this model has {len(stack)} layers, give some of 0 to "
            f"{len(stack) - 1}, or null for all"
        )
    usual = cache_shape(model.config).head_dim ** -0.5
    for layer in chosen:
        scaling = getattr(getattr(stack[layer], "self_attn", None), "scaling", None)
        if scaling is not None and abs(scaling - usual) > 1e-6 * usual:
            raise ValueError(
                f"layer {layer} scales its dot products by {scaling:.6g} and not by 1/sqrt(head_dim) = {usual:.6g}, "
                "which a tensor file cannot record: collect from another model"
            )
    return chosen


def sample_bytes(model: PreTrainedModel, length: int, layers: int, dtype: torch.dtype) -> int:
    """Bytes of Q, K and V of ``layers`` layers for one sample of ``length`` tokens, without the files' headers."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads * cache_shape(config).head_dim
    return layers * length * (heads + cache_shape(config).pair_bytes) * dtype.itemsize


def disk_need(
    folder: Path, model: PreTrainedModel, samples: Mapping[int, int], layers: Sequence[int], dtype: torch.dtype
) -> str:
    """One line about the disk space that ``samples`` (length -> number) need in ``folder``.

    Raises ``ValueError`` if that much is not free.
    """
    sizes = {length: count * sample_bytes(model, length, len(layers), dtype) for length, count in samples.items()}
    free, need = free_bytes(folder), sum(sizes.values())
    parts = [f"{samples[n]} x {n} tokens {_readable(size)}" for n, size in sorted(sizes.items())]
    name = str(dtype).removeprefix("torch.")
    line = (
        f"Q, K, V of {len(layers)} layers in {name}, {', '.join(parts) or 'nothing'}: "
        f"{_readable(need)} in all; {_readable(free)} are free on the disk of {folder}"
    )
    if need > free:
        raise ValueError(f"{line}: choose fewer layers, samples or shorter lengths, or another output folder")
    return line


def _readable(size: int) -> str:
    """Format bytes: 1536 -> "1.5 KiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
