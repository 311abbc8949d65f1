"""A capture writes the tensors that attention used; a failed forward leaves nothing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.statistics import StatisticsSettings, attention_statistics
from sparsekv_pl.blocksparse.tensor_capture import TensorCapture, chosen_layers, disk_need, sample_bytes
from sparsekv_pl.blocksparse.tensor_format import read
from sparsekv_pl.eviction.prefill import continue_from
from tests.random_models import Build

LENGTH, STAMP = 40, "20240219_120000"


def ids(rows: int = 2, tokens: int = LENGTH) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


@contextmanager
def eager_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What each layer's attention gives before its output projection, (B, L, H * D), computed by eager attention."""
    outputs: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), attention_implementation(model, "eager"):
        yield outputs
    for hook in hooks:
        hook.remove()


def collected(model: PreTrainedModel, folder: Path, rows: dict[int, int], **settings: object) -> list[dict]:
    capture = TensorCapture(folder, model, "some/model", **settings)  # type: ignore[arg-type]
    capture.begin(rows, STAMP)
    continue_from(model, ids(), DynamicCache(), 0, observer=capture)
    return capture.finish()


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
def test_eager_attention_follows_from_the_files(random_model: Build, tmp_path: Path) -> None:
    model = random_model()
    records = collected(model, tmp_path / "out", {1: 7, 0: 3})
    names = {f"tensors_seq{LENGTH}_layer{n}_sample{s}_{STAMP}.pt" for n in (0, 1) for s in (3, 7)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names == {record["file"] for record in records}
    with eager_outputs(model) as outputs:
        model(input_ids=ids())
    for layer, output in enumerate(outputs):
        for row, sample in {0: 3, 1: 7}.items():
            found = read(tmp_path / "out" / f"tensors_seq{LENGTH}_layer{layer}_sample{sample}_{STAMP}.pt")
            assert found.query.shape == (1, 4, LENGTH, 8)
            assert found.key.shape == found.value.shape == (1, 2, LENGTH, 8)
            keys, values = (states.repeat_interleave(2, 1) for states in (found.key, found.value))
            logits = found.query @ keys.transpose(2, 3) / 8**0.5
            logits = logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
            attended = (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)
            torch.testing.assert_close(attended, output[row : row + 1], rtol=1e-4, atol=1e-5)


def test_metadata_and_records_say_what_is_in_a_file(random_model: Build, tmp_path: Path) -> None:
    model, settings = random_model(), StatisticsSettings(window=16, top_k=4, block_size=8)
    (record,) = collected(model, tmp_path, {1: 0}, layers=[1], statistics=settings)
    path = tmp_path / record["file"]
    found = read(path)
    assert found.metadata == {
        "layer_idx": 1,
        "seq_len": LENGTH,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "hidden_size": 32,
        "batch_size": 1,
        "timestamp": STAMP,
        "model_path": "some/model",
    }
    assert (record["layer"], record["sample"], record["seq_len"]) == (1, 0, LENGTH)
    assert record["bytes"] == path.stat().st_size
    reference = attention_statistics(found.query, found.key, settings)
    for name in ("block_sparsity", "effective_support", "top_k_coverage"):
        assert record[name] == pytest.approx(getattr(reference, name).mean(-1)[0].tolist())
        assert len(record[name]) == 4


def test_a_forward_that_fails_leaves_no_files(random_model: Build, tmp_path: Path) -> None:
    model = random_model()
    capture = TensorCapture(tmp_path, model, "some/model")
    capture.begin({0: 0}, STAMP)

    def fails(layer: int, *states: Tensor) -> None:
        capture(layer, *states)
        if layer == 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        continue_from(model, ids(), DynamicCache(), 0, observer=fails)
    assert not list(tmp_path.glob("*.pt"))
    capture.begin({0: 0}, STAMP)
    continue_from(model, ids(), DynamicCache(), 0, observer=capture)
    assert len(capture.finish()) == len(list(tmp_path.iterdir())) == 2


def test_a_forward_that_shows_too_little_is_an_error(random_model: Build, tmp_path: Path) -> None:
    model = random_model()
    capture = TensorCapture(tmp_path, model, "some/model")
    capture.begin({0: 0}, STAMP)
    with attention_implementation(model, "sdpa"), torch.no_grad():
        model(input_ids=ids())
    with pytest.raises(ValueError, match=r"showed \[\] of the layers \[0, 1\]"):
        capture.finish()
    capture.begin({0: 0}, STAMP)
    cache = DynamicCache()
    continue_from(model, ids(tokens=8), cache, 0)
    with pytest.raises(ValueError, match="40 queries over 48 keys are not a dense forward"):
        continue_from(model, ids(), cache, 8, observer=capture)


def test_layers_are_the_models(random_model: Build) -> None:
    model = random_model(num_hidden_layers=3)
    assert chosen_layers(model, None) == [0, 1, 2]
    assert chosen_layers(model, [2, 0, 2]) == [0, 2]
    for wrong in ([0, 3], [-1], []):
        with pytest.raises(ValueError, match="this model has 3 layers, give some of 0 to 2"):
            chosen_layers(model, wrong)


def test_attention_with_another_scale_is_refused(random_model: Build) -> None:
    model = random_model()
    model.model.layers[1].self_attn.scaling = 0.25
    assert chosen_layers(model, [0]) == [0]
    with pytest.raises(ValueError, match=r"layer 1 scales its dot products by 0\.25"):
        chosen_layers(model, None)


def test_the_disk_need_is_what_the_files_take(random_model: Build, tmp_path: Path) -> None:
    model = random_model(hidden_size=64, head_dim=64)
    collected(model, tmp_path, {0: 0, 1: 1})
    needed = 2 * sample_bytes(model, LENGTH, 2, torch.float32)
    files = list(tmp_path.glob("*.pt"))
    taken = sum(path.stat().st_size for path in files)
    assert needed <= taken <= needed + 4096 * len(files)
    assert f"2 x {LENGTH} tokens" in disk_need(tmp_path, model, {LENGTH: 2}, [0, 1], torch.float32)


def test_what_does_not_fit_is_refused(random_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    need = 3 * sample_bytes(model, 4096, 2, torch.bfloat16)
    assert need == 3 * 2 * 4096 * (4 + 2 + 2) * 8 * 2
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            assert "3 MiB in all; 3 MiB are free" in disk_need(
                tmp_path / "a" / "b", model, {4096: 3}, [0, 1], torch.bfloat16
            )
        else:
            with pytest.raises(ValueError, match="choose fewer layers, samples or shorter lengths"):
                disk_need(tmp_path / "a" / "b", model, {4096: 3}, [0, 1], torch.bfloat16)
    assert not (tmp_path / "a").exists()
