"""Figures from made-up attention: exact chances, and shares computed by hand."""

import itertools

import numpy as np
import pytest

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
    ranking,
    recall,
    shares,
)
from sparsekv_pl.analysis.oracle_layers import best_head, by_layer, head_recall
from sparsekv_pl.analysis.oracle_report import found
from sparsekv_pl.storage.records import Record
from tests.analysis.oracle_cases import at, by_place, even, hot, invented, record


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
