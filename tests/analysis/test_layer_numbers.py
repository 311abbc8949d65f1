"""Reports of a model that evicts in some of its layers call them by the model's own numbers."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress
from matplotlib.figure import Figure

from data.question_sources import PlantedQuestions
from data.questions import QuestionData
from data.text import EmbeddedText
from sparsekv_pl.analysis.anchor_attention import AnchorAnalysis
from sparsekv_pl.analysis.oracle_blocks import OracleBlocks
from sparsekv_pl.analysis.statistics_analysis import AttentionStatisticsAnalysis
from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.evaluation import evaluation_module
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.models.backbone import Backbone
from tests.tiny_training import MakeCases, MakeTrainer
from tests.windowed_models import KINDS, saved

FULL = [layer for layer, kind in enumerate(KINDS) if kind == "full_attention"]
"""1 and 3 of 4."""


@pytest.fixture(scope="module")
def windowed(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Backbone]:
    folder = saved("gemma3", tmp_path_factory.mktemp("windowed"), tiny_models["llama"])
    return lambda: Backbone(pretrained=folder, dtype="float32", lora=None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr("sparsekv_pl.reporting.analysis_page.png", lambda figure: figures.append(figure) or b"drawn")
    return figures


def check_axes(figures: list[Figure], at_least: int) -> None:
    """Every axis of layers has their numbers, and nothing between or beyond them."""
    axes = [axes for figure in figures for axes in figure.axes]
    axis = [one.yaxis for one in axes if "layer" in one.get_ylabel()] + [
        one.xaxis for one in axes if one.get_xlabel() == "layer"
    ]
    assert len(axis) >= at_least
    for one in axis:
        assert [one.get_major_formatter()(row, None) for row in (-1, 0, 1, 2)] == ["", "1", "3", ""]


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_statistics(
    windowed: Any, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path, drawn: list[Figure]
) -> None:
    settings = StatisticsSettings(top_k=8, block_size=32)
    analysis = AttentionStatisticsAnalysis(windowed(), str(tmp_path), settings)
    tiny_trainer().predict(analysis, tiny_cases(tasks=[], windows=2), return_predictions=False)
    assert [summary["layers"] for summary in report_of(tmp_path)["summaries"]] == [FULL]
    for name in ("heads.csv", "received.csv"):
        rows = list(csv.DictReader((tmp_path / name).read_text().splitlines()))
        assert sorted({int(row["layer"]) for row in rows}) == FULL
    assert re.findall(r"<tr><t[dh][^>]*>(\d+)</t", (tmp_path / "report.html").read_text()) == list(map(str, FULL))
    check_axes(drawn, 7)


def test_anchors(
    windowed: Any, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path, drawn: list[Figure]
) -> None:
    analysis = AnchorAnalysis(windowed(), str(tmp_path))
    tiny_trainer().predict(analysis, tiny_cases(tasks=[], windows=2), return_predictions=False)
    assert report_of(tmp_path)["variants"]["base"]["layers"]["layers"] == FULL
    check_axes(drawn, 2)


def test_oracle_blocks(windowed: Any, tiny_trainer: MakeTrainer, tmp_path: Path, drawn: list[Figure]) -> None:
    """The layers to average over are the model's, too."""
    for wrong in ([0], [2], [4]):
        with pytest.raises(
            ValueError, match=rf"layers is \[{wrong[0]}\]: give some of 1, 3, which have full attention"
        ):
            OracleBlocks(windowed(), str(tmp_path), layers=wrong)
    scores = []
    for layers in ([1], [3], None):
        data = QuestionData(PlantedQuestions(EmbeddedText(), facts=1), samples=4, max_tokens=200)
        analysis = OracleBlocks(windowed(), str(tmp_path), block_size=32, top_k=2, layers=layers)
        tiny_trainer().predict(analysis, data, return_predictions=False)
        report = report_of(tmp_path)
        scores.append(torch.tensor(report["samples"][0]["block_scores"]))
    torch.testing.assert_close(scores[2], (scores[0] + scores[1]) / 2, atol=1e-5, rtol=0)
    found = report["findings"]["base"]
    assert [row["layer"] for row in found["layers"]] == FULL
    assert {found["best_head"][which]["layer"] for which in ("all", "other_half")} <= set(FULL)
    check_axes(drawn, 9)


def test_an_evaluation_and_its_viewer(
    windowed: Any, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    draw = evaluation_module.sparsity_figure
    monkeypatch.setattr(
        evaluation_module, "sparsity_figure", lambda *a, **k: figures.append(draw(*a, **k)) or figures[-1]
    )
    module = EvaluationModule(windowed(), [Setting(KeyDiffPress(), [0.5])], str(tmp_path), sparsity=True, views=1)
    tiny_trainer().test(module, tiny_cases(windows=1, cases_per_cell=1), verbose=False)
    assert json.loads((tmp_path / "sparsity.json").read_text())["layers"] == FULL
    check_axes(figures, 4)
    page = (tmp_path / "viewer.html").read_text()
    content = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    assert content["numbers"] == FULL and content["layers"] == len(FULL)
    assert [point["pairs"] for point in content["points"]] == [len(content["tokens"]) // 2]
