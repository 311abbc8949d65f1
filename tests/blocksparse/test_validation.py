"""Sketch&Walk on tensor files: every figure equals its definition; invalid files are refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from data.tensor_files import TensorFiles
from sparsekv_pl.attention.block_sparse import dense_reference
from sparsekv_pl.attention.blocks import Blocks, TopBlocks, top_blocks
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk
from sparsekv_pl.blocksparse.tensor_format import LayerTensors, Metadata, write
from sparsekv_pl.blocksparse.validation import SketchWalkValidation, pair_sparsity, target_sparsity, validated

SEED_KEYS = [
    "sample_id",
    "layer_idx",
    "seq_len",
    "num_heads",
    "actual_sparsity",
    "target_sparsity",
    "block_sparsity",
    "cosine_similarity",
    "mse",
    "max_error",
    "num_blocks_selected",
    "total_blocks",
    "block_selection_ratio",
    "dense_time_ms",
    "sparse_time_ms",
    "speedup",
]
BLOCK, LENGTH, TOP = 8, 60, 3  # eight blocks, the last of four tokens


def tensors(layer: int = 0, sample: int = 0, length: int = LENGTH) -> LayerTensors:
    generator = torch.Generator().manual_seed(100 * sample + layer)
    query, key, value = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    metadata = Metadata(
        layer_idx=layer,
        seq_len=length,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=64,
        batch_size=1,
        timestamp="20240219_120000",
        model_path="some/model",
    )
    return LayerTensors(2 * query, key, value, metadata)


@dataclass
class Drawn:
    """Random scores by head, new ones in every layer, and none for ``dense``; ``calls`` is its state."""

    block_size: int = BLOCK
    dense: tuple[int, ...] = ()
    calls: int = 0

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        self.calls += 1
        count = -(-key.shape[2] // self.block_size)
        scores = torch.rand(1, query.shape[1], count, count, generator=torch.Generator().manual_seed(self.calls))
        return None if layer in self.dense else scores


def seen(blocks: Blocks) -> Tensor:
    """(B, G, L, L) bool: the pairs that are computed, one by one."""
    token = torch.arange(blocks.keys)
    chosen = blocks.mask()[:, :, token // blocks.block_size][..., token // blocks.block_size]
    return chosen & (token <= token[:, None])


def test_every_figure_is_as_defined() -> None:
    made = tensors()
    measured = validated(made, TopBlocks(Drawn(), TOP), BLOCK, TOP, repeats=2)
    scores = Drawn()(0, made.query, made.key)
    assert scores is not None
    blocks = top_blocks(scores, TOP, BLOCK, LENGTH)
    every = torch.zeros(1, 1, 8, 8).masked_fill(torch.ones(8, 8).tril().bool(), 1)
    all_blocks = top_blocks(every, 8, BLOCK, LENGTH)
    sparse, dense = (dense_reference(made.query, made.key, made.value, chosen) for chosen in (blocks, all_blocks))
    norms = sparse.norm(dim=-1) * dense.norm(dim=-1)
    pairs = LENGTH * (LENGTH + 1) / 2
    assert measured == {
        "layer_idx": 0,
        "seq_len": LENGTH,
        "num_heads": 4,
        "actual_sparsity": pytest.approx(1 - float(seen(blocks).sum((2, 3)).double().mean()) / pairs),
        "target_sparsity": pytest.approx(1 - float(seen(blocks)[0, 0].sum()) / pairs),  # as every head's
        "block_sparsity": pytest.approx(1 - (1 + 2 + 6 * 3) / 36),
        "cosine_similarity": pytest.approx(float(((sparse * dense).sum(-1) / norms).mean()), abs=1e-5),
        "mse": pytest.approx(float((sparse - dense).pow(2).mean()), rel=1e-4),
        "max_error": pytest.approx(float((sparse - dense).abs().max()), rel=1e-4),
        "num_blocks_selected": TOP,
        "total_blocks": 8,
        "block_selection_ratio": TOP / 8,
        "dense_time_ms": measured["dense_time_ms"],
        "sparse_time_ms": measured["sparse_time_ms"],
        "speedup": pytest.approx(measured["dense_time_ms"] / measured["sparse_time_ms"]),
        "kept_dense": False,
    }
    assert measured["dense_time_ms"] > 0
    assert measured["sparse_time_ms"] > 0
    assert 0 < measured["cosine_similarity"] < 0.99


def test_a_layer_that_is_kept_dense_is_told_as_dense() -> None:
    measured = validated(tensors(), TopBlocks(Drawn(dense=(0,)), TOP), BLOCK, TOP)
    assert measured["kept_dense"]
    assert (measured["actual_sparsity"], measured["block_sparsity"], measured["mse"], measured["max_error"]) == (0,) * 4
    assert measured["cosine_similarity"] == pytest.approx(1)
    assert measured["target_sparsity"] == pytest.approx(target_sparsity(LENGTH, BLOCK, TOP)) != 0
    assert measured["num_blocks_selected"] == measured["total_blocks"] == 8


@pytest.mark.parametrize(("length", "top_k"), [(60, 3), (64, 2), (64, 8), (24, 16), (65, 4)])
def test_sparsity_counts_pairs(length: int, top_k: int) -> None:
    count = -(-length // BLOCK)
    blocks = top_blocks(
        torch.rand(1, 2, count, count, generator=torch.Generator().manual_seed(0)), top_k, BLOCK, length
    )
    counted = 1 - float(seen(blocks).sum((2, 3)).double().mean()) / (length * (length + 1) / 2)
    assert pair_sparsity(blocks) == pytest.approx(counted, abs=1e-12)
    assert target_sparsity(length, BLOCK, top_k) == pytest.approx(counted, abs=1e-12)


def test_timing_leaves_the_walk_alone() -> None:
    scorer = Drawn()
    selector = TopBlocks(scorer, TOP)
    measured = [validated(tensors(layer), selector, BLOCK, TOP, repeats=repeats) for layer, repeats in ((0, 3), (1, 1))]
    assert scorer.calls == 2
    again = TopBlocks(Drawn(), TOP)
    for layer, one in enumerate(measured):
        other = validated(tensors(layer), again, BLOCK, TOP, repeats=2)
        assert other["mse"] == one["mse"]


Validate = Callable[..., SketchWalkValidation]


@pytest.fixture
def validate(tiny_trainer: Callable[..., Trainer], tmp_path: Path) -> Validate:
    """Validates the files in tmp_path/tensors with blocks of 8 and two more than the first and the own."""

    def run(**settings: Any) -> SketchWalkValidation:
        defaults = {"block_size": BLOCK, "sketch_dim": 16, "top_k_blocks": 4, "dense_layers": 1, "repeats": 1}
        module = SketchWalkValidation(str(tmp_path / "out"), **(defaults | settings))
        tiny_trainer().predict(module, TensorFiles(str(tmp_path / "tensors")))
        return module

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three layers of two samples."""
    (tmp_path / "tensors").mkdir()
    for sample in (0, 1):
        for layer in (0, 1, 2):
            write(tmp_path / "tensors", sample, tensors(layer, sample))
    return tmp_path / "tensors"


def latest(module: SketchWalkValidation, kind: str) -> Any:
    return json.loads(max(module.output.glob(f"validation_{kind}_*.json")).read_text())


@pytest.mark.usefixtures("folder")
def test_the_results_are_those_of_the_walk(validate: Validate) -> None:
    module = validate(damping=0.6)
    results = latest(module, "results")
    assert [list(result) for result in results] == [SEED_KEYS] * 6
    assert [result["sample_id"] for result in results] == [
        f"tensors_seq{LENGTH}_layer{layer}_sample{sample}_20240219_120000" for sample in (0, 1) for layer in (0, 1, 2)
    ]
    for sample in (0, 1):
        walk = TopBlocks(SketchWalk(block_size=BLOCK, sketch_dim=16, exponent=8, dense_layers=1, damping=0.6), 4)
        for result in results[3 * sample : 3 * sample + 3]:
            made = tensors(result["layer_idx"], sample)
            blocks = walk(result["layer_idx"], made.query, made.key)
            dense = torch.nn.functional.scaled_dot_product_attention(
                made.query, made.key, made.value, is_causal=True, enable_gqa=True
            )
            sparse = dense if blocks is None else dense_reference(made.query, made.key, made.value, blocks)
            assert result["mse"] == pytest.approx(float((sparse - dense).pow(2).mean()), rel=1e-3, abs=1e-12)
    summary = latest(module, "summary")
    sums = summary["by_length"][str(LENGTH)]
    assert (sums["count"], sums["kept_dense"], sums["sparse_layers"]["count"]) == (6, 2, 4)
    values = [result["mse"] for result in results]
    assert sums["mse"] == {"mean": pytest.approx(sum(values) / 6), "min": min(values), "max": max(values)}
    sparse = [result["mse"] for result in results if result["layer_idx"]]
    assert sums["sparse_layers"]["mse"]["mean"] == pytest.approx(sum(sparse) / 4)
    layer = [result["speedup"] for result in results if result["layer_idx"] == 2]
    assert summary["by_layer"]["2"]["speedup"]["mean"] == pytest.approx(sum(layer) / 2)
    assert summary["settings"]["top_k_blocks"] == 4
    assert summary["refused"] == []
    assert all((module.output / name).stat().st_size for name in ("report.md", "report.html", "validation.png"))


def test_files_that_are_not_sound_are_refused_and_the_rest_goes_on(
    validate: Validate, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(folder.glob("*_sample0_*"))
    first[1].write_bytes(first[1].read_bytes()[:-200])
    made = tensors(4)
    mismatched = write(folder, 0, made)
    torch.save({"Q": made.query, "K": made.key[:, :, 1:], "V": made.value, "metadata": made.metadata}, mismatched)
    (folder / "tensors_other.pt").write_bytes(first[0].read_bytes())
    module = validate()
    results, summary = latest(module, "results"), latest(module, "summary")
    assert [result["layer_idx"] for result in results] == [0, 2, 0, 1, 2]
    reasons = {entry["file"]: entry["reason"] for entry in summary["refused"]}
    assert list(reasons) == [
        first[1].name,
        mismatched.name,
        "tensors_other.pt",
    ]
    for wrong, (name, reason) in zip(
        ["truncated", "K of shape", "contradicts its metadata"], reasons.items(), strict=True
    ):
        assert wrong in reason
        assert name in reason
        assert name in (module.output / "report.md").read_text()
    assert "validated 5 files, refused 3" in capsys.readouterr().out
    write(folder, 0, tensors(1))  # mended
    first[1].touch()
    module = validate()
    assert len(latest(module, "results")) == 6


def test_nothing_sound_is_a_report_too(validate: Validate, tmp_path: Path) -> None:
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors" / "tensors_seq60_layer0_sample0_x.pt").write_bytes(b"")
    module = validate()
    assert latest(module, "results") == []
    assert latest(module, "summary")["files"] == 0
    assert (module.output / "validation.png").exists()


@pytest.mark.parametrize("wrong", [{"top_k_blocks": 1}, {"repeats": 0}, {"exponent": 0}, {"block_size": 0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("_blocks")):
        SketchWalkValidation(**wrong)
