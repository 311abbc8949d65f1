"""Oracle blocks: what is found in records made up by hand, and the page and pictures that say it."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekv_pl.analysis.oracle_figures import MOST_ROWS, layers_figure, mass_figure, recall_figure, samples_figure
from sparsekv_pl.analysis.oracle_findings import (
    ATTENTION,
    BM25,
    PLACE,
    Choice,
    Sample,
    answer_rank,
    at_least,
    blocks_carrying,
    chance,
    concentration,
    differences,
    ranking,
    recall,
    shares,
)
from sparsekv_pl.analysis.oracle_layers import best_head, by_layer, head_recall
from sparsekv_pl.analysis.oracle_report import found, oracle_data, write_oracle
from sparsekv_pl.analysis.oracle_tables import figures_line
from sparsekv_pl.storage.records import Record
from tests.analysis.oracle_cases import LAYERS, at, by_place, even, hot, invented, record


def test_shares_by_hand() -> None:
    scores = [0.4, 0.1, 0.0, 0.3]
    assert shares(scores).tolist() == pytest.approx([0.5, 0.875, 1, 1])
    assert shares(scores, 1).tolist() == pytest.approx([0.75, 1, 1])
    assert shares([scores, scores[::-1]], 3).tolist() == [[1], [1]]
    assert shares([0.5, 0, 0], 1).tolist() == [0, 0]
    assert [blocks_carrying(share, scores) for share in (0.5, 0.51, 0.875, 0.9, 1.0)] == [1, 2, 2, 3, 3]
    assert [blocks_carrying(share, scores, 1) for share in (0.75, 0.8)] == [1, 2]
    assert ranking([0.1, 0.3, 0.1, 0.3]).tolist() == [1, 3, 0, 2]


def test_ranks_of_the_answer_by_hand() -> None:
    scores = [0.9, 0.2, 0.5, 0.2]
    assert [int(answer_rank(scores, [block])) for block in range(4)] == [1, 3, 2, 4]
    assert [int(answer_rank(scores, [block], 1)) for block in (1, 2, 3)] == [2, 1, 3]
    assert int(answer_rank(scores, [3, 2])) == 2
    assert int(answer_rank(scores, [0, 1], 1)) == 2  # block 0 does not take part
    assert answer_rank([[scores, scores[::-1]]], [0]).tolist() == [[1, 3]]


@pytest.mark.parametrize("blocks, answer, top_k", [(8, 1, 5), (9, 2, 3), (4, 3, 2), (5, 1, 5), (3, 1, 5)])
def test_chance_is_counted_out(blocks: int, answer: int, top_k: int) -> None:
    drawn = list(itertools.combinations(range(blocks), min(top_k, blocks)))
    hits = sum(any(block < answer for block in some) for some in drawn)
    assert chance(blocks, answer, top_k) == pytest.approx(hits / len(drawn))


def test_the_probability_of_so_many_hits_is_counted_out() -> None:
    chances = [0.1, 0.5, 0.9, 0.3]
    for hits in range(5):
        expected = 0.0
        for outcome in itertools.product([0, 1], repeat=4):
            if sum(outcome) >= hits:
                expected += np.prod([p if hit else 1 - p for p, hit in zip(chances, outcome, strict=True)])
        assert at_least(hits, chances) == pytest.approx(expected)


def test_concentration_adds_up() -> None:
    samples = invented(hot)
    whole, rest = concentration(samples).values()
    total = 0.2 + 0.6 + 0.001 * 10
    assert whole["top_share"]["mean"] == pytest.approx((total - 0.007) / total)
    assert whole["curve"][:2] == pytest.approx([0.6 / total, 0.8 / total])
    assert rest["curve"][0] == pytest.approx(0.6 / 0.61)
    assert (len(whole["curve"]), len(rest["curve"])) == (12, 11)
    assert whole["curve"][-1] == rest["curve"][-1] == pytest.approx(1)
    assert whole["top_share_if_even"] == pytest.approx(5 / 12)
    assert rest["top_share_if_even"] == pytest.approx(5 / 11)
    assert [whole["carrying"][t]["mean"] for t in ("0.8", "0.9", "0.95")] == [2, 2, 2]
    assert [rest["carrying"][t]["mean"] for t in ("0.8", "0.9", "0.95")] == [1, 1, 1]
    assert concentration(invented(even))["with sink"]["carrying"]["0.9"]["mean"] == 11
    for part in (whole, rest):
        for value, (low, high) in zip(part["curve"], part["curve_intervals"], strict=True):
            assert low - 1e-9 <= value <= high + 1e-9


def test_documents_of_different_lengths_stand_side_by_side() -> None:
    samples = [Sample(record(0, [0.5, 0.5], 1)), Sample(record(1, [0.25] * 4, 1)), Sample(record(2, [1.0], 0))]
    parts = concentration(samples)
    assert parts["with sink"]["curve"] == pytest.approx([(0.5 + 0.25 + 1) / 3, (1 + 0.5 + 1) / 3, 2.75 / 3, 1])
    assert parts["without sink"]["top_share"]["cases"] == 2
    assert parts["without sink"]["curve"] == pytest.approx([(1 + 1 / 3) / 2, (1 + 2 / 3) / 2, 1])


def test_a_planted_answer_is_found_and_its_chance_is_exact() -> None:
    samples = invented(hot)
    for name, blocks in (("with sink", 12), ("without sink", 11)):
        part = recall(samples)[name]
        for ranker in (ATTENTION, BM25):
            assert (part[ranker]["hits"], part[ranker]["cases"]) == (22, 22)
            assert part[ranker]["chance"] == pytest.approx(5 / blocks)
            assert part[ranker]["p_by_chance"] == pytest.approx((5 / blocks) ** 22)
            assert part[ranker]["curve_by_chance"] == pytest.approx([k / blocks for k in range(1, blocks + 1)])
        assert part["attention minus BM25"]["mean"] == 0
        assert part["answer_share"]["mean"] == pytest.approx(0.6 / (0.81 if blocks == 12 else 0.61))
    assert recall(samples)["with sink"][ATTENTION]["curve"][0] == 1
    assert recall(samples)["with sink"][PLACE]["hits"] < 22


def test_place_alone_knows_nothing_of_the_question() -> None:
    """Attention that goes to one place for all questions is what place alone predicts."""
    answers = [3, 7, 3, 9, 3, 3]
    samples = [Sample(record(i, at({3: 0.5}), a), Choice(top_k=1)) for i, a in enumerate(answers)]
    part = recall(samples)["without sink"]
    assert part[ATTENTION]["hits"] == part[PLACE]["hits"] == 4
    assert part[BM25]["hits"] == 6
    longer = Sample(record(9, [*at({3: 0.5}), 0.1], 3), Choice(top_k=1))
    part = recall([*samples, longer])["without sink"]
    assert (part[ATTENTION]["cases"], part[PLACE]["cases"]) == (7, 6)  # no other has as many blocks


def test_answers_in_the_sink_block_and_without_a_place_are_counted_where_they_can_be() -> None:
    samples = [Sample(record(i, even(0), answer)) for i, answer in enumerate((0, 1, None, 5))]
    parts = recall(samples)
    assert parts["with sink"][ATTENTION]["cases"] == 3
    assert parts["without sink"][ATTENTION]["cases"] == 2
    assert found(samples)["answers_with_a_place"] == 3
    assert concentration(samples)["with sink"]["top_share"]["cases"] == 4


def one_head(number: int, answer: int) -> Record:
    """Head 2 of layer 1 attends to the answer, the others to the end."""
    made = record(number, by_place(answer), answer)
    mass = np.asarray(made["mass"])
    mass[1, 2] = hot(answer)
    return made | {"mass": mass.tolist()}


def test_the_head_that_finds_the_answer_is_named_and_tested_on_other_questions() -> None:
    samples = [Sample(one_head(i, i % 5 + 1)) for i in range(10)]
    heads, best = head_recall(samples), best_head(samples)
    assert heads is not None
    assert np.argwhere(heads == 1).tolist() == [[1, 2]]
    assert best is not None
    assert [best[half]["cases"] for half in ("all", "other_half")] == [10, 5]
    for chosen in best.values():
        assert (chosen["layer"], chosen["head"], chosen["recall"]) == (1, 2, 1)
    assert best_head(samples[:3]) is None
    layers = by_layer([Sample(sample.record, Choice(heads=[2])) for sample in samples])
    assert [layer["without sink"]["hits"] for layer in layers] == [0, 10]
    assert layers[1]["without sink"]["answer_share"]["mean"] == pytest.approx(0.6 / 0.61)
    assert layers[1]["sink_share"]["mean"] == pytest.approx(0.2 / 0.81)
    assert layers[1]["beyond"]["mean"] == pytest.approx(1 - 0.81)
    chosen = [Sample(sample.record, Choice(layers=[1], heads=[2])) for sample in samples]
    assert recall(chosen)["without sink"][ATTENTION]["hits"] == 10


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
