"""The oracle's report: main figures, one and two variants, Scout-KV's layout, pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekv_pl.analysis.oracle_figures import MOST_ROWS, layers_figure, mass_figure, recall_figure, samples_figure
from sparsekv_pl.analysis.oracle_findings import ATTENTION, Choice, Sample, differences, shares
from sparsekv_pl.analysis.oracle_report import found, oracle_data, write_oracle
from sparsekv_pl.analysis.oracle_tables import figures_line
from sparsekv_pl.storage.records import Record
from tests.analysis.oracle_cases import LAYERS, by_place, even, hot, invented, record


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made but not drawn, which takes most of a report's time."""
    monkeypatch.setattr("sparsekv_pl.reporting.analysis_page.png", lambda _: b"a picture")


def test_trained_minus_base_is_taken_question_by_question() -> None:
    base, trained = invented(by_place), invented(hot)
    changed = differences(base, trained[::-1])
    assert changed["recall, without sink"]["mean"] == 1
    assert changed["recall, without sink"]["cases"] == 22
    expected = np.mean([shares(t.scores)[4] - shares(b.scores)[4] for b, t in zip(base, trained, strict=True)])
    assert changed["share of the hottest, with sink"]["mean"] == pytest.approx(expected)


def test_the_main_figures_in_a_line() -> None:
    line = figures_line(found(invented(hot)), 5)
    assert "(evenly spread: 45 %)" in line
    assert "22 of 22 (100 % [85, 100]) by attention" in line
    assert "; minus BM25 " in line
    unknown = figures_line(found([Sample(record(i, even(0), None)) for i in range(6)]), 5)
    assert unknown.endswith("the answer's block is unknown, or block 0")


def written(folder: Path, records: Sequence[Record], **choice: Any) -> dict[str, Any]:
    named = {"base": "model", "trained": "model + adapter"}
    said, paths = write_oracle(folder, records, Choice(**choice), 512, named, "none (bfloat16)", {"device": "cpu"})
    assert said.startswith("model: ")
    assert all(path.exists() for path in paths)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.usefixtures("undrawn")
def test_the_report_of_two_variants(tmp_path: Path) -> None:
    base, trained = invented(by_place), invented(hot)
    records = [s.record for s in base] + [s.record | {"variant": "trained"} for s in trained]
    report = written(tmp_path, records)
    assert set(report["findings"]) == {"base", "trained", "trained minus base"}
    text = (tmp_path / "report.md").read_text()
    assert "| recall, without sink | +100.0 % [+100.0, +100.0] | 22 |" in text
    assert "| trained | without sink | attention | 22 of 22 (100 % [85, 100]) | 45 % |" in text
    assert len(report["samples"]) == 44
    base_data, trained_data = (json.loads((tmp_path / f"oracle_data{e}.json").read_text()) for e in ("", "_trained"))
    assert base_data["samples"][0]["top_5_block_ids"] == [11, 10, 9, 8, 7]
    assert trained_data["samples"][0]["top_5_block_ids"] == [1, 0, 2, 3, 4]


@pytest.mark.parametrize("scores", [[1.0], [0.3, 0.2]])
def test_documents_of_a_block_or_two_have_a_report(tmp_path: Path, scores: list[float]) -> None:
    report = written(tmp_path, [record(i, scores, len(scores) - 1) for i in range(2)])
    assert report["findings"]["base"]["questions"] == 2


@pytest.mark.usefixtures("undrawn")
def test_questions_that_share_a_document_are_told(tmp_path: Path) -> None:
    records = [record(i, hot(2), 2) | {"documents": ["one"]} for i in range(3)]
    written(tmp_path, records)
    assert "The 3 questions come from 1 documents" in (tmp_path / "report.md").read_text()


def test_the_seeds_layout_with_another_number_of_blocks() -> None:
    (sample,) = [Sample(record(0, hot(3), 3), Choice(top_k=2))]
    (line,) = oracle_data([sample], "model", "4-bit (bitsandbytes)", 512)["samples"]
    assert line == {
        "question": "What is 0?",
        "answer": "0",
        "top_2_block_ids": [3, 0],
        "all_block_scores": {str(i): pytest.approx(score) for i, score in enumerate(hot(3))},
        "num_blocks": 12,
        "context_tokens": 512 * 12 - 7,
    }


def test_the_pictures_show_the_figures() -> None:
    samples = invented(hot, questions=MOST_ROWS + 5)
    figures = found(samples)
    whole, rest, bars = mass_figure({"base": figures["concentration"]}).axes
    assert whole.lines[0].get_ydata().tolist() == pytest.approx(figures["concentration"]["with sink"]["curve"])
    assert rest.lines[0].get_ydata().tolist() == pytest.approx(figures["concentration"]["without sink"]["curve"])
    assert rest.lines[1].get_ydata().tolist() == pytest.approx([k / 11 for k in range(1, 12)])
    assert sorted(bar.get_height() for bar in bars.patches) == [1, 1, 1, 2, 2, 2]
    curves = recall_figure({"base": figures["recall"]}).axes[1].lines
    assert [line.get_label() for line in curves] == ["attention", "BM25", "place alone", "chance"]
    assert curves[0].get_ydata().tolist() == figures["recall"]["without sink"][ATTENTION]["curve"]
    mass, _ = layers_figure({"base": figures["layers"]}).axes
    assert mass.lines[2].get_ydata().tolist() == pytest.approx([0.2 / 0.81] * LAYERS)
    axes = samples_figure(samples).axes[0]
    assert len(axes.patches) == MOST_ROWS
    rows = axes.images[0].get_array()
    for patch in axes.patches:  # the answer's block is the hottest of its row
        column, row = round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)
        assert rows[row, column] == 1
