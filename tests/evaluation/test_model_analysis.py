"""The base class of analyses: reuse of finished work, base and trained, ranks, and early checks."""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from sparsekv_pl.evaluation.model_analysis import Analysis
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.storage.records import Record
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeCases, MakeTrainer


class Norms(Analysis):
    """Measures the norm of the last hidden state; ``dying_at`` is the measurement that is killed."""

    def __init__(self, *settings: Any, scale: float = 1.0, dying_at: int | None = None) -> None:
        super().__init__(*settings)
        self.scale, self.dying_at = scale, dying_at
        self.measured: list[str] = []

    def described(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def measure(self, batch: CaseBatch) -> Sequence[Record]:
        if len(self.measured) == self.dying_at:
            raise KeyboardInterrupt
        assert not torch.is_grad_enabled()
        hidden = decoder_of(self.causal_lm)(input_ids=batch["context_ids"]).last_hidden_state[:, -1]
        self.measured += [case.id for case in batch["cases"]]
        norms = (self.scale * hidden.norm(dim=-1)).tolist()
        return [{"id": case.id, "norm": norm} for case, norm in zip(batch["cases"], norms, strict=True)]

    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        path = self.output / "report.json"
        path.write_text(json.dumps({"records": records, "environment": environment}))
        return [path]


@pytest.fixture
def adapter(tiny_adapter: MakeAdapter, tmp_path: Path) -> Callable[[float], str]:
    """Adapters of these deviations, all in one folder."""
    return lambda std: tiny_adapter(std, tmp_path / "adapter")


@pytest.fixture
def run(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> Callable[..., tuple[list[Record], list[str]]]:
    """Run into one folder; the report's records and the ids that were really measured."""

    def run(windows: int = 4, adapter: str | None = None, **settings: Any) -> tuple[list[Record], list[str]]:
        analysis = Norms(tiny_backbone(adapter=adapter), str(tmp_path / "run"), **settings)
        data = tiny_cases(windows=windows, tasks=[])
        tiny_trainer().predict(analysis, data, return_predictions=False)
        return json.loads((tmp_path / "run" / "report.json").read_text())["records"], analysis.measured

    return run


def test_only_what_is_missing_is_measured(run: Callable[..., Any], adapter: Callable[[float], str]) -> None:
    first, ids = run(windows=2)
    both, measured = run(windows=2, adapter=adapter(0.5))
    assert measured == ids, "the base is there already, the trained model is not"
    assert [r for r in both if r["variant"] == "base"] == first
    trained = [r for r in both if r["variant"] == "trained"]
    assert [r["id"] for r in trained] == ids
    assert all(t["norm"] != b["norm"] for t, b in zip(trained, first, strict=True))
    assert run(windows=2, adapter=adapter(0.1))[1] == ids, "another adapter in the same folder"
    assert run(windows=2, scale=2.0)[1] == ids, "another setting"
    assert run(windows=2)[1] == []


def test_a_killed_run_goes_on(run: Callable[..., Any], adapter: Callable[[float], str], tmp_path: Path) -> None:
    """Killed between base and trained of the second batch of two."""
    trained = adapter(0.5)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(adapter=trained, dying_at=6)
    assert not (tmp_path / "run" / "report.json").exists()
    records, measured = run(adapter=trained)
    assert len(records) == 8
    assert measured == [r["id"] for r in records if r["variant"] == "trained"][2:]


def test_contexts_beyond_the_model_are_refused_first(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    analysis = Norms(tiny_backbone(), str(tmp_path))
    data = tiny_cases(windows=1, tasks=[], lengths=[96, 1025])
    with pytest.raises(ValueError, match=r"1025 tokens.*trained on 1024"):
        tiny_trainer().predict(analysis, data, return_predictions=False)
    assert analysis.measured == []


def test_two_ranks_measure_every_batch_once(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Three batches: one rank has nothing to do in the last turn."""

    def norms(folder: str, **settings: Any) -> dict[str, float]:
        analysis = Norms(tiny_backbone(), str(tmp_path / folder))
        tiny_trainer(**settings).predict(analysis, tiny_cases(windows=5, tasks=[]), return_predictions=False)
        records = json.loads((tmp_path / folder / "report.json").read_text())["records"]
        assert len(records) == 5
        return {r["id"]: r["norm"] for r in records}

    alone = norms("alone")
    strategy = DDPStrategy(process_group_backend="gloo", start_method="forkserver", timeout=timedelta(minutes=2))
    assert norms("two", strategy=strategy, devices=2) == pytest.approx(alone)
    lines = [len(path.read_text().splitlines()) for path in (tmp_path / "two" / "results").glob("*.jsonl")]
    assert sorted(lines) == [1, 2]
