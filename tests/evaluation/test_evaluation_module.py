"""A run of measurements: report, reuse of finished work, and failures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import (
    CAMPress,
    ComposedPress,
    DMSPress,
    KnormPress,
    PerLayerCompressionPress,
    RandomPress,
    SimLayerKVPress,
    SnapKVPress,
    ThinKPress,
    TOVAPress,
)
from torch.utils.data import DataLoader

from sparsekv_pl.evaluation import measurement
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo
from sparsekv_pl.reporting import summary
from sparsekv_pl.reporting.model_card import write_card
from sparsekv_pl.storage.records import Results
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeTrainer

CONTEXT = 48


def batch(task: str, number: int) -> CaseBatch:
    rows = torch.randint(2, 1024, (2, CONTEXT + 8), generator=torch.Generator().manual_seed(number))
    answers = () if task == TEXT else ("zebra",)
    return CaseBatch(
        context_ids=rows[:, :CONTEXT],
        continuation_ids=rows[:, CONTEXT:],
        continuation_lengths=torch.tensor([8, 6]),
        cases=[CaseInfo(f"{task}/{number}/{i}", task, answers, max_new_tokens=3, depth=0.5) for i in range(2)],
    )


def batches() -> list[CaseBatch]:
    return [batch(TEXT, 0), batch(TEXT, 1), batch("needle", 2)]


def settings() -> list[Setting]:
    return [Setting(SnapKVPress(window_size=8), [0.25, 0.75]), Setting(KnormPress(), [0.5])]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The points that are really measured, in order, without those read from disk."""
    names: list[str] = []
    at = Measurement.at

    def recording(self: Measurement, point: Any) -> Any:
        names.append(point.name)
        return at(self, point)

    monkeypatch.setattr(Measurement, "at", recording)
    return names


@pytest.fixture
def run(tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Measure into the folder of this name and return its report."""

    def run(
        name: str = "run", points: list[Setting] | None = None, data: Any = None, card: bool = False, **backbone: Any
    ) -> Any:
        module = EvaluationModule(tiny_backbone(**backbone), points or settings(), str(tmp_path / name), card=card)
        loader = DataLoader(batches() if data is None else data, batch_size=None)
        tiny_trainer().test(module, loader, verbose=False)
        return json.loads((tmp_path / name / "report.json").read_text())

    return run


@pytest.fixture
def adapter(tiny_adapter: MakeAdapter, tmp_path: Path) -> Callable[..., str]:
    """The folder of an adapter with this deviation, one for each, its training.json and its card."""
    training = {"presses": ["SnapKV", "LagKV"], "steps": 110}

    def make(std: float = 0.0) -> str:
        folder = tiny_adapter(std, tmp_path / f"adapter-{std}", training)
        write_card(Path(folder))
        return folder

    return make


def scores(report: dict[str, Any], side: str) -> list[tuple[Any, ...]]:
    return [(row["press"], row["compression_ratio"], row["metric"], row[side], row["cases"]) for row in report["rows"]]


def test_finished_work_that_fits_no_piece_is_named(
    run: Callable[..., Any], measured: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    report = run()
    done = list(measured)
    Results(tmp_path / "run" / "results").put("a key with a class path of 0.1.0", [{"nll": 1.0}], "old")
    assert "also holds" not in caplog.text
    assert run()["rows"] == report["rows"]
    assert measured == done, "the rest is read from disk"
    assert "results also holds 1 finished pieces of work of other settings" in caplog.text


def test_a_base_alone(run: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = run()
    assert [row["press"] for row in report["rows"]].count("full cache") == 2
    assert {(row["press"], row["compression_ratio"]) for row in report["rows"]} == {
        ("full cache", 0.0),
        ("SnapKV", 0.25),
        ("SnapKV", 0.75),
        ("Knorm", 0.5),
    }
    assert {row["metric"]: row["cases"] for row in report["rows"]} == {"perplexity": 4, "needle_accuracy": 2}
    assert all(row["trained"] is None and not row["seen_in_training"] for row in report["rows"])
    assert report["environment"]["device"] == "cpu"
    assert report["environment"]["wall_seconds"] > 0
    assert "report.json" in capsys.readouterr().out
    for name in ("report.csv", "report.md", "report.html", "report.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_an_untrained_adapter_changes_nothing(run: Callable[..., Any], adapter: Callable[..., str]) -> None:
    """Nor does chance: a press without a seed draws the same for both."""
    report = run(points=[*settings(), Setting(RandomPress(), [0.5])], adapter=adapter())
    assert scores(report, "base") == scores(report, "trained")


def test_a_trained_one_is_measured_beside_its_base(run: Callable[..., Any], adapter: Callable[..., str]) -> None:
    folder = Path(adapter(0.3))
    card = (folder / "README.md").read_text()
    base = run("base", card=True)
    run("silent", points=[Setting(KnormPress(), [0.5])], adapter=str(folder))
    assert (folder / "README.md").read_text() == card
    report = run("trained", adapter=str(folder), card=True)
    assert "Not measured yet" in card and "Not measured yet" not in (folder / "README.md").read_text()
    assert "| SnapKV | 0.75 | seen | " in (folder / "README.md").read_text()
    assert scores(report, "base") == scores(base, "base")
    texts = [row for row in report["rows"] if row["metric"] == "perplexity"]
    assert all(row["trained"] != row["base"] for row in texts)
    assert {row["press"] for row in report["rows"] if row["seen_in_training"]} == {"SnapKV"}
    assert report["training"]["steps"] == 110
    assert all({"recalled_words_base", "recalled_words_trained"} <= set(row) for row in texts)


def test_nothing_finished_is_measured_again(
    run: Callable[..., Any], measured: list[str], adapter: Callable[..., str]
) -> None:
    first = run()
    assert len(measured) == 3 * 4
    measured.clear()
    assert scores(run(), "base") == scores(first, "base")
    assert not measured
    run(points=[*settings(), Setting(KnormPress(), [0.25])])
    assert measured == ["Knorm_0-25_dense"] * 3
    measured.clear()
    run(adapter=adapter(0.3))
    assert len(measured) == 3 * 4, "the base is there already"
    measured.clear()
    run(points=[Setting(SnapKVPress(window_size=16), [0.25])])
    assert measured == ["SnapKV_0-25_dense"] * 3, "another window is another press"


def test_interrupted_and_rerun_equals_uninterrupted(
    run: Callable[..., Any], measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole")
    at = Measurement.at
    calls = iter(range(100))

    def stopped(self: Measurement, point: Any) -> Any:
        if next(calls) == 7:
            raise SystemExit
        return at(self, point)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Measurement, "at", stopped)
        run("halves")
    measured.clear()
    assert scores(run("halves"), "base") == scores(whole, "base")
    assert len(measured) == 12 - 7


def test_a_damaged_piece_is_measured_again(run: Callable[..., Any], measured: list[str], tmp_path: Path) -> None:
    first = run()
    path = tmp_path / "run" / "results" / "base_Knorm_0-5_dense.0.jsonl"
    path.write_text(path.read_text().replace('"nll": ', '"nll": 1', 1))
    measured.clear()
    assert scores(run(), "base") == scores(first, "base")
    assert measured == ["Knorm_0-5_dense"]


class FailsOnce(KnormPress):
    """Out of memory, say; ``broken`` is of the class, so the test can mend it."""

    broken = True

    def score(self, *args: Any, **kwargs: Any) -> Any:
        if self.broken:
            raise RuntimeError("out of everything")
        return super().score(*args, **kwargs)


def test_a_failure_is_in_the_table_and_stops_no_other(
    run: Callable[..., Any], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [Setting(FailsOnce(), [0.5]), *settings()]
    report = run(points=points)
    assert {row["press"] for row in report["rows"] if row.get("base") is not None} >= {
        "full cache",
        "SnapKV",
        "Knorm",
    }
    assert measured.count("FailsOnce_0-5_dense") == 1, "tried once, not for every batch"
    for name in ("report.json", "report.md", "report.html"):
        assert "out of everything" in (tmp_path / "run" / name).read_text()
    monkeypatch.setattr(FailsOnce, "broken", False)
    measured.clear()
    mended = run(points=points)
    assert measured == ["FailsOnce_0-5_dense"] * 3
    knorm, other = ([row["base"] for row in mended["rows"] if row["press"] == name] for name in ("Knorm", "FailsOnce"))
    assert knorm == other
    assert "out of everything" not in (tmp_path / "run" / "report.json").read_text()


def test_scores_reach_the_logger_and_are_summed_up_once(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    summed: list[Any] = []
    rows = summary.summary_rows
    monkeypatch.setattr(summary, "summary_rows", lambda measured: summed.append(measured) or rows(measured))
    module = EvaluationModule(tiny_backbone(), settings(), str(tmp_path))
    logger = CSVLogger(tmp_path, name="", version="log")
    tiny_trainer(logger=logger).test(module, DataLoader(batches(), batch_size=None), verbose=False)
    logged = (tmp_path / "log" / "metrics.csv").read_text()
    for name in ("base_SnapKV_0-75_dense/perplexity", "base_SnapKV_0-75_dense/kl", "base_full_cache_0_dense/exact"):
        assert name in logged
    assert len(summed) == 1, "page, pictures, terminal, CSV, JSON and logger share one summary"


UNFIT = [
    SimLayerKVPress(),
    ThinKPress(),
    ComposedPress([KnormPress(), SnapKVPress()]),
    DMSPress(KnormPress()),
    PerLayerCompressionPress(KnormPress(), [0.5, 0.5]),
    CAMPress(KnormPress()),
]


def test_a_press_without_a_ratio_to_set_is_a_line_in_the_table(
    run: Callable[..., Any], measured: list[str], tmp_path: Path
) -> None:
    run(points=[*(Setting(press, [0.5]) for press in UNFIT), Setting(TOVAPress(), [0.5])])
    assert set(measured) == {"full_cache_0_dense", "TOVA_0-5_dense"}
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.count("has no compression_ratio to set") >= len(UNFIT)


def test_what_is_left_of_a_batch_is_answered_together(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, together = measurement.greedy_together, []

    def recording(model: Any, asked: list[Any], *rest: Any) -> None:
        together.append(len(asked))
        decode(model, asked, *rest)

    monkeypatch.setattr(measurement, "greedy_together", recording)
    run(points=settings()[1:])
    assert together == [2], "the full cache and Knorm"
    run()
    assert together == [2, 2], "SnapKV at both ratios; the others are on disk"
