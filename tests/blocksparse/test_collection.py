"""Collecting tensors from a tiny model: files, resuming, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sparsekv_pl.attention.statistics import StatisticsSettings, attention_statistics
from sparsekv_pl.blocksparse.collection import TensorCollection, Timestamps, summaries_of
from sparsekv_pl.blocksparse.tensor_format import read
from sparsekv_pl.eviction.prefill import continue_from
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeCases, MakeTrainer

SETTINGS = StatisticsSettings(window=32, top_k=8, block_size=16)


@pytest.fixture
def collect(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tiny_cases: MakeCases, tmp_path: Path
) -> Callable[..., TensorCollection]:
    """Two windows of 64 and of 96 tokens from the tiny Llama; ``seconds`` is the time on the clock."""

    def run(seconds: int = 0, adapter: str | None = None, layers: Any = None, **data: Any) -> TensorCollection:
        module = TensorCollection(tiny_backbone(adapter=adapter), str(tmp_path / "out"), layers, SETTINGS)
        module.timestamps = Timestamps(lambda: float(seconds))
        settings = {"lengths": [64, 96], "tasks": [], "windows": 2, "batch_size": 1} | data
        tiny_trainer().predict(module, tiny_cases(**settings))
        return module

    return run


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the contexts that really went through the model."""
    lengths: list[int] = []

    def recording(model: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return continue_from(model, ids, *args, **kwargs)

    monkeypatch.setattr("sparsekv_pl.blocksparse.collection.continue_from", recording)
    return lengths


def files(module: TensorCollection) -> list[Path]:
    return sorted(module.output.glob("tensors_*.pt"))


def test_every_layer_of_every_window_is_collected(
    collect: Callable[..., TensorCollection], tiny_cases: MakeCases, tiny_models: dict[str, str]
) -> None:
    module = collect(batch_size=2)
    stamp = module.timestamps.of(64)
    assert [path.name for path in files(module)] == [
        f"tensors_seq{length}_layer{layer}_sample{sample}_{stamp}.pt"
        for length in (64, 96)
        for layer in (0, 1)
        for sample in (0, 1)
    ]
    data = tiny_cases(lengths=[96], tasks=[], windows=2, batch_size=1)
    data.tokenizer = module.tokenizer
    data.setup()
    seen: dict[int, Any] = {}
    for sample, batch in enumerate(data.predict_dataloader()):
        observe = lambda layer, *states: seen.__setitem__(layer, states)  # noqa: E731
        with torch.no_grad():
            continue_from(module.causal_lm, batch["context_ids"], DynamicCache(), 0, observer=observe)
        for layer, states in seen.items():
            found = read(module.output / f"tensors_seq96_layer{layer}_sample{sample}_{stamp}.pt")
            assert found.metadata["model_path"] == tiny_models["llama"]
            for one, other in zip((found.query, found.key, found.value), states, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_summaries_say_what_is_there(collect: Callable[..., TensorCollection]) -> None:
    module = collect()
    stamp = module.timestamps.of(96)
    summary = json.loads((module.output / f"summary_seq96_{stamp}.json").read_text())
    own = [path for path in files(module) if "seq96" in path.name]
    assert summary["files"] == [path.name for path in own]
    assert (summary["num_samples"], summary["samples"], summary["layers"]) == (2, [0, 1], [0, 1])
    assert summary["bytes"] == sum(path.stat().st_size for path in own)
    assert summary["dtype"] == ["float32"]
    for layer, measures in summary["by_layer"].items():
        tensors = [read(path) for path in own if f"layer{layer}" in path.name]
        measured = [attention_statistics(found.query, found.key, SETTINGS) for found in tensors]
        for name in ("block_sparsity", "effective_support", "top_k_coverage"):
            assert measures[name] == pytest.approx(
                float(torch.stack([getattr(m, name) for m in measured]).mean()), rel=1e-4
            )
    assert (module.output / "attention_seq96.png").exists()
    report = json.loads((module.output / "report.json").read_text())
    assert report["summaries"] == sorted(path.name for path in module.output.glob("summary_*.json"))
    assert f"| 96 | 2 | 2 | 4 | {summary['bytes'] / 2**20:.1f} |" in (module.output / "report.md").read_text()


def test_what_is_collected_is_not_collected_again(
    collect: Callable[..., TensorCollection], forwards: list[int]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in files(collect())}
    assert forwards == [64, 64, 96, 96]
    module = collect(seconds=3600)
    assert forwards == [64, 64, 96, 96]
    assert {path: path.stat().st_mtime_ns for path in files(module)} == before
    assert len(list(module.output.glob("summary_*.json"))) == 2
    files(module)[0].unlink()
    collect(seconds=7200)
    assert forwards == [64, 64, 96, 96, 64]


def test_other_layers_are_collected_too(collect: Callable[..., TensorCollection], forwards: list[int]) -> None:
    module = collect(layers=[1], lengths=[64])
    assert {path.name.split("_")[2] for path in files(module)} == {"layer1"}
    collect(seconds=3600, layers=[0, 1], lengths=[64])
    assert forwards == [64, 64, 64, 64]


def test_of_two_variants_the_trained_one_is_collected(
    collect: Callable[..., TensorCollection], tiny_adapter: MakeAdapter
) -> None:
    adapter = tiny_adapter()
    settings = {"lengths": [64], "windows": 1}
    module = collect(adapter=adapter, **settings)
    adapted = read(files(module)[0])
    assert adapted.metadata["model_path"].endswith(f" + {adapter}")
    shutil.rmtree(module.output)
    base = read(files(collect(**settings))[0])
    assert not torch.allclose(adapted.key, base.key, atol=1e-3)


def test_retrieval_cases_are_numbered_after_the_windows(
    collect: Callable[..., TensorCollection], tiny_cases: MakeCases
) -> None:
    tasks = tiny_cases().tasks
    module = collect(lengths=[96], tasks=tasks, windows=1, cases_per_cell=1, layers=[0])
    assert [path.name.split("_")[3] for path in files(module)] == ["sample0", "sample1", "sample2"]


def test_the_disk_need_is_printed_before_the_first_forward(
    collect: Callable[..., TensorCollection],
    forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    collect(lengths=[64])
    assert "2 layers in float32, 2 x 64 tokens 128 KiB: 128 KiB in all" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    collect(lengths=[64])  # nothing is missing
    assert "nothing: 0 B in all" in capsys.readouterr().out
    assert forwards == [64, 64]
    with pytest.raises(ValueError, match="2 x 96 tokens 192 KiB: 192 KiB in all; 0 B are free"):
        collect()
    assert forwards == [64, 64]


def test_wrong_layers_are_refused(collect: Callable[..., TensorCollection], forwards: list[int]) -> None:
    with pytest.raises(ValueError, match="this model has 2 layers"):
        collect(layers=[2])
    assert not forwards


def test_a_length_has_one_timestamp() -> None:
    seconds = iter([0.0, 86400.0])
    stamps = Timestamps(lambda: next(seconds))
    first, second = stamps.of(4096), stamps.of(8192)
    assert first == stamps.of(4096) < second == stamps.of(8192)
    assert len(first) == len("20240219_120000")


def test_a_summary_has_the_time_of_its_last_sample() -> None:
    measures = {"block_sparsity": [0.5, 0.7], "effective_support": [10.0, 30.0], "top_k_coverage": [1.0, 0.5]}
    shared = {"seq_len": 64, "model_path": "m", "dtype": "bfloat16", "bytes": 5, "layer": 3, **measures}
    records = [{"sample": 0, "timestamp": stamp, "file": stamp, **shared} for stamp in ("2024_1", "2024_2")]
    ((name, summary),) = summaries_of(records, SETTINGS).items()
    assert name == "summary_seq64_2024_2.json"
    assert summary["num_samples"] == 2
    assert summary["by_layer"] == {
        "3": pytest.approx({"block_sparsity": 0.6, "effective_support": 20, "top_k_coverage": 0.75})
    }
    assert summary["mean"] == summary["by_layer"]["3"]
