"""Collecting during an evaluation: the same files as in a collection, and the same evaluation as without."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvpress import KnormPress

from callbacks.collect import CollectTensors
from sparsekv_pl.blocksparse.collection import TensorCollection
from sparsekv_pl.blocksparse.tensor_format import read
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.points import Setting
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeCases, MakeTrainer

Run = Callable[..., EvaluationModule]


@pytest.fixture
def evaluate(
    tiny_backbone: MakeBackbone,
    tiny_trainer: MakeTrainer,
    tiny_cases: MakeCases,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Evaluates four windows and four needles of 96 tokens, with and without KnormPress, and draws no report."""
    for place in (
        "evaluation.measuring_module.write_run",
        "evaluation.evaluation_module.write_kvpress_layout",
        "evaluation.evaluation_module.sparsity_figure",
    ):
        monkeypatch.setattr(f"sparsekv_pl.{place}", lambda *_, **__: [])

    def run(*callbacks: CollectTensors, name: str = "evaluation", adapter: str | None = None, **more: Any) -> Any:
        setting = Setting(KnormPress(), [0.5], chunk_tokens=more.pop("chunk_tokens", None))
        module = EvaluationModule(
            tiny_backbone(adapter=adapter),
            [setting],
            str(tmp_path / name),
            sparsity=more.pop("sparsity", False),
        )
        trainer = tiny_trainer(*callbacks)
        trainer.test(module, tiny_cases(**more), verbose=False)
        return module

    return run


def callback(folder: Path, **settings: Any) -> CollectTensors:
    return CollectTensors(str(folder), **({"lengths": [96], "samples": 2} | settings))


def names(folder: Path) -> list[str]:
    return sorted(path.name.rsplit("_", 2)[0] for path in folder.glob("tensors_*.pt"))


def of_samples(*samples: int) -> list[str]:
    return sorted(f"tensors_seq96_layer{layer}_sample{sample}" for layer in (0, 1) for sample in samples)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_files_are_those_of_a_collection(
    evaluate: Run,
    tiny_backbone: MakeBackbone,
    tiny_trainer: MakeTrainer,
    tiny_cases: MakeCases,
    tiny_adapter: MakeAdapter,
    tmp_path: Path,
    with_adapter: bool,
) -> None:
    used = tiny_adapter() if with_adapter else None
    evaluate(callback(tmp_path / "during", samples=5), adapter=used)
    collection = TensorCollection(tiny_backbone(adapter=used), str(tmp_path / "alone"))
    tiny_trainer().predict(collection, tiny_cases())
    assert names(tmp_path / "during") == of_samples(0, 1, 2, 3, 4)
    assert names(tmp_path / "alone") == of_samples(*range(8))
    for path in sorted((tmp_path / "during").glob("*.pt")):
        (other,) = (tmp_path / "alone").glob(path.name.rsplit("_", 2)[0] + "_*")
        ours, theirs = read(path), read(other)
        assert {**ours.metadata, "timestamp": ""} == {**theirs.metadata, "timestamp": ""}
        for name in ("query", "key", "value"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)
    summary = json.loads(next((tmp_path / "during").glob("summary_seq96_*.json")).read_text())
    assert (summary["num_samples"], summary["layers"], summary["num_files"]) == (5, [0, 1], 10)


def test_the_evaluation_is_the_same_with_its_own_observer(evaluate: Run, tmp_path: Path) -> None:
    """``sparsity`` passes an observer, in the first forward over each window of text."""
    collecting = evaluate(callback(tmp_path / "during", samples=4), name="with", sparsity=True)
    alone = evaluate(name="without", sparsity=True)
    assert names(tmp_path / "during") == of_samples(0, 1, 2, 3)
    assert len([record for record in alone.records if "block_sparsity" in record]) == 2
    timed = ("seconds", "peak_bytes")
    plain = [[{k: v for k, v in r.items() if not k.endswith(timed)} for r in m.records] for m in (collecting, alone)]
    assert plain[0] == plain[1]


def test_tasks_layers_and_samples_are_chosen(evaluate: Run, tmp_path: Path) -> None:
    evaluate(callback(tmp_path / "during", tasks=["facts"], layers=[1], samples=3))
    assert names(tmp_path / "during") == [f"tensors_seq96_layer1_sample{sample}" for sample in range(3)]


def test_other_lengths_are_left_alone(evaluate: Run, tmp_path: Path) -> None:
    evaluate(callback(tmp_path / "during", lengths=[80, 4096], samples=9), lengths=[80, 96], windows=1)
    assert {name.split("_")[1] for name in names(tmp_path / "during")} == {"seq80"}
    with pytest.raises(ValueError, match=r"lengths=\[4096\], but the data has \[96\]"):
        evaluate(callback(tmp_path / "during", lengths=[4096]), name="again")


def test_evaluations_in_chunks_and_finished_ones_collect_whole_contexts(evaluate: Run, tmp_path: Path) -> None:
    """Contexts of 96 in chunks of 48; the second run finds its work on disk."""
    for name in ("first", "again"):
        evaluate(callback(tmp_path / name, lengths=[48, 96]), chunk_tokens=48, windows=0)
        assert names(tmp_path / name) == of_samples(0, 1)
        assert {path.suffix for path in (tmp_path / name).iterdir()} == {".pt", ".json"}


def test_what_cannot_be_collected_is_refused_before_anything_runs(
    evaluate: Run, tiny_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="samples=0"):
        callback(tmp_path, samples=0)
    with pytest.raises(ValueError, match="this model has 2 layers"):
        evaluate(callback(tmp_path / "during", layers=[5]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="0 B are free on the disk"):
        evaluate(callback(tmp_path / "during"))
    assert not (tmp_path / "during").exists()
    with pytest.raises(ValueError, match="needs a module with a model, which SimpleNamespace has not"):
        callback(tmp_path).on_test_start(tiny_trainer(), SimpleNamespace())  # type: ignore[arg-type]
