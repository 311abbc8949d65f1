"""Validating Sketch&Walk against dense attention on files of queries, keys and values: error, sparsity and speed."""

import copy
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table as TerminalTable
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from sparsekv_pl.attention.block_sparse import block_sparse_attention
from sparsekv_pl.attention.blocks import NOTHING, Blocks, Selector, TopBlocks, block_count
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk
from sparsekv_pl.blocksparse.tensor_format import LayerTensors, TensorFileError, read
from sparsekv_pl.blocksparse.validation_figures import validation_figure
from sparsekv_pl.blocksparse.validation_summary import expected_table, sections, summary
from sparsekv_pl.evaluation.measuring_module import MeasuringModule, Piece
from sparsekv_pl.evaluation.time_and_memory import timed
from sparsekv_pl.reporting import write_analysis
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.file_formats import json_bytes
from sparsekv_pl.reporting.page import Table
from sparsekv_pl.storage.fingerprint import digest_of
from sparsekv_pl.storage.records import Record


class SketchWalkValidation(MeasuringModule):
    """Runs Sketch&Walk and dense attention over the layers of every sample in order, without a model.

    Writes validation_results_{timestamp}.json (a record per file, see ``validated``), their summary as
    validation_summary_{timestamp}.json, and a report. An invalid file is refused by name, and the walk continues
    without it. Finished samples are not run again, unless their files or a setting changed. Raises ``ValueError`` for a
    setting out of range.

    Parameters
    ----------
    output
        Folder for all output; null: where the run's name says, else output/sketchwalk.
    block_size, sketch_dim, exponent, dense_layers, damping, seed
        See ``SketchWalk``.
    top_k_blocks
        Number of key blocks that a query block attends to, including the first and its own.
    repeats
        Number of timings of dense and sparse attention, in turn; medians are reported.
    """

    def __init__(
        self,
        output: str | None = None,
        block_size: int = 64,
        sketch_dim: int = 64,
        top_k_blocks: int = 16,
        exponent: float = 8,
        dense_layers: int = 2,
        damping: float = SketchWalk.damping,
        seed: int = 0,
        repeats: int = 3,
    ) -> None:
        super().__init__(output or "output/sketchwalk")
        if repeats < 1:
            raise ValueError(f"repeats={repeats} times nothing: give at least 1")
        self.top_k_blocks, self.repeats = top_k_blocks, repeats
        self.settings = {
            "block_size": block_size,
            "sketch_dim": sketch_dim,
            "exponent": exponent,
            "dense_layers": dense_layers,
            "damping": damping,
            "seed": seed,
        }
        self.selector()  # raises for invalid settings

    def selector(self) -> Selector:
        """Make a selector for one sample's layers, which it must see in order."""
        return TopBlocks(SketchWalk(**self.settings), self.top_k_blocks)  # type: ignore[arg-type]

    def pieces(self, batch: list[str], variant: str) -> Iterator[Piece]:
        """One piece: a sample's files in ascending order of layers."""
        paths = [Path(path) for path in batch]
        key = self.key(
            variant,
            settings=self.settings,
            top_k_blocks=self.top_k_blocks,
            repeats=self.repeats,
            files=[[path.name, digest_of(path) if path.exists() else None] for path in paths],
        )
        yield Piece(key, "validation", lambda: self._sample(paths))

    def write(self, records: list[Record], environment: dict[str, Any]) -> list[Path]:
        """Write the results, the summary and the report."""
        stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(self.started))
        summed_up = summary(records, self.settings | {"top_k_blocks": self.top_k_blocks, "repeats": self.repeats})
        measured = [record for record in records if "refused" not in record]
        results = [{name: value for name, value in one.items() if name != "kept_dense"} for one in measured]
        names = [f"validation_{kind}_{stamp}.json" for kind in ("results", "summary")]
        paths = write_analysis(
            self.output,
            "Sketch&Walk against dense attention",
            sections(summed_up),
            summed_up | {"files": names},
            environment,
            {"validation.png": ("Cosine similarity and speed-up by layer", validation_figure(records))},
            dict(zip(names, map(json_bytes, (results, summed_up)), strict=True)),
        )
        show(_for_terminal(expected_table(summed_up)))
        show(f"validated {summed_up['files']} files, refused {len(summed_up['refused'])}")
        return paths

    def _sample(self, paths: Sequence[Path]) -> list[Record]:
        selector, records = self.selector(), []
        for path in paths:
            try:
                tensors = read(path)
            except TensorFileError as error:
                records.append({"file": path.name, "refused": str(error)})
            else:
                block_size, top_k = int(self.settings["block_size"]), self.top_k_blocks
                measured = validated(tensors, selector, block_size, top_k, self.repeats, self.device)
                records.append({"sample_id": path.stem} | measured)
        return records


def validated(
    tensors: LayerTensors,
    selector: Selector,
    block_size: int,
    top_k: int,
    repeats: int = 3,
    device: torch.device | str = "cpu",
) -> Record:
    """Compare sparse with dense attention on one layer; return its record, without the sample_id.

    Dense is scaled_dot_product_attention(is_causal=True); sparse is selection and block-sparse attention together. Both
    run in the dtype of the file. The fields:

    layer_idx, seq_len, num_heads
        Values of the file's metadata; num_heads counts query heads.
    actual_sparsity
        Share of the causal query-key pairs that was not computed, mean over heads.
    target_sparsity
        The same, if every query block selected ``top_k`` blocks, or all visible ones if they are fewer.
    block_sparsity
        Share of the pairs of a query block and a visible key block that was not selected.
    cosine_similarity
        Cosine of the dense and the sparse output (D,) of a query and head, mean over queries and heads.
    mse, max_error
        Mean squared and largest absolute difference of the outputs' elements.
    num_blocks_selected, total_blocks, block_selection_ratio
        Largest number of key blocks of a query block, key blocks of the sequence, and their ratio.
    dense_time_ms, sparse_time_ms, speedup
        Medians of ``repeats`` turns after a first, uncounted one; dense divided by sparse.
    kept_dense
        Whether the selector left this layer dense: sparsity 0, all blocks, and sparse equals dense. Left out of
        validation_results_{timestamp}.json.
    """
    layer, length = tensors.metadata["layer_idx"], tensors.metadata["seq_len"]
    query, key, value = (t.to(device, copy=True) for t in (tensors.query, tensors.key, tensors.value))
    turns = [copy.deepcopy(selector) for _ in range(repeats)]  # selecting changes the walk's state
    dense = _dense(query, key, value)
    blocks = selector(layer, query, key)
    sparse = dense if blocks is None else block_sparse_attention(query, key, value, blocks)
    dense_ms, sparse_ms = _milliseconds(turns, layer, query, key, value)
    total = block_count(length, block_size)
    selected = total if blocks is None else int((blocks.indices != NOTHING).sum(-1).max())
    error = sparse.float() - dense.float()
    return {
        "layer_idx": layer,
        "seq_len": length,
        "num_heads": query.shape[1],
        "actual_sparsity": 0.0 if blocks is None else pair_sparsity(blocks),
        "target_sparsity": target_sparsity(length, block_size, top_k),
        "block_sparsity": 0.0 if blocks is None else float(blocks.sparsity().mean()),
        "cosine_similarity": float(cosine_similarity(dense.float(), sparse.float(), dim=-1).mean()),
        "mse": float(error.square().mean()),
        "max_error": float(error.abs().max()),
        "num_blocks_selected": selected,
        "total_blocks": total,
        "block_selection_ratio": selected / total,
        "dense_time_ms": dense_ms,
        "sparse_time_ms": sparse_ms,
        "speedup": dense_ms / sparse_ms,
        "kept_dense": blocks is None,
    }


def pair_sparsity(blocks: Blocks) -> float:
    """The share of a whole context's causal query-key pairs that is outside ``blocks``, mean over rows and heads."""
    mask, size = blocks.mask(), blocks.block_size
    rows, columns = mask.shape[-2:]
    assert rows == columns, "the blocks must be those of a whole context"
    tokens = (blocks.keys - torch.arange(rows, device=mask.device) * size).clamp(max=size).double()
    pairs = tokens[:, None] * tokens  # query-key pairs of a query block and an earlier key block
    pairs = torch.where(torch.eye(rows, device=mask.device, dtype=torch.bool), tokens * (tokens + 1) / 2, pairs)
    computed = (mask * pairs).sum((-2, -1)).mean()
    return float(1 - computed / (blocks.keys * (blocks.keys + 1) / 2))


def target_sparsity(length: int, block_size: int, top_k: int) -> float:
    """``pair_sparsity`` of a context of ``length`` tokens in which every query block attends to ``top_k`` blocks."""
    count = block_count(length, block_size)
    rows, columns = torch.arange(count)[:, None], torch.arange(count)
    nearest = (columns <= rows) & (columns > rows - top_k)  # any choice gives the same: all blocks but the own are full
    indices = torch.where(nearest, columns, count).sort(-1).values
    return pair_sparsity(Blocks(indices.where(indices < count, NOTHING)[None, None], block_size, length))


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _sparse(selector: Selector, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    blocks = selector(layer, query, key)
    return _dense(query, key, value) if blocks is None else block_sparse_attention(query, key, value, blocks)


def _milliseconds(turns: Sequence[Selector], layer: int, *states: Tensor) -> tuple[float, float]:
    """Median milliseconds of dense and of sparse attention, timed alternately for each of ``turns``."""
    times = [(timed(partial(_dense, *states))[1], timed(partial(_sparse, turn, layer, *states))[1]) for turn in turns]
    dense, sparse = zip(*times, strict=True)
    return 1000 * median(dense), 1000 * median(sparse)


def _for_terminal(table: Table) -> TerminalTable:
    shown = TerminalTable(*table.header, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for line in table.lines:
        shown.add_row(*line)
    return shown
