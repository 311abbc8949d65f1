"""Base against trained on the same cases, retention over the full cache, and unpaired cases."""

import math

import pytest

from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.reporting.condition import FULL_CACHE, Condition
from sparsekv_pl.reporting.intervals import wilson_interval
from sparsekv_pl.reporting.sorted_records import ALL_RETRIEVAL, sorted_records
from sparsekv_pl.reporting.summary import headline, summary_rows


def needle(case, press, exact, variant="base", task="niah_single_1", ratio=None, **more):
    ratio = (0.0 if press == FULL_CACHE else 0.5) if ratio is None else ratio
    known = {"case": case, "task": task, "length": 64, "depth": 0.5, "seed": 0, "variant": variant, "press": press}
    return known | {"compression_ratio": ratio, "prefill": "dense", "exact": exact} | more


def rows_of(records):
    return {(row.condition.press, row.task): row for row in summary_rows(sorted_records(records))}


def test_retention_is_the_score_over_that_of_the_full_cache():
    base = [(1, 1), (1, 0), (1, 0), (0, 1)]  # full cache, SnapKV
    trained = [(1, 1), (1, 1), (1, 1), (1, 0)]
    records = [
        needle(str(case), press, float(exact), variant)
        for variant, both in (("base", base), ("trained", trained))
        for case, pair in enumerate(both)
        for press, exact in zip((FULL_CACHE, "SnapKV"), pair, strict=True)
    ]
    row = rows_of(records)["SnapKV", "niah_single_1"]
    assert (row.base, row.trained, row.difference) == (0.5, 0.75, 0.25)
    assert row.base_interval == wilson_interval(2, 4)
    assert row.retention_base == pytest.approx(2 / 3)
    assert row.retention_trained == 0.75
    assert row.retention_difference == pytest.approx(0.75 - 2 / 3)
    assert row.retention_cases == row.cases == 4
    low, high = row.difference_interval
    assert -1 <= low < 0.25 < high <= 1
    full = rows_of(records)[FULL_CACHE, "niah_single_1"]
    assert (full.base, full.trained, full.difference, full.retention_base) == (0.75, 1.0, 0.25, None)


def test_perplexity_weighs_tokens_and_brings_kl():
    def text(case, press, nll, tokens, kl):
        record = needle(case, press, None, task="text") | {"nll": nll, "tokens": tokens, "kl": kl}
        return {key: value for key, value in record.items() if key != "exact"}

    records = [text("a", FULL_CACHE, 20.0, 10, 0.0), text("b", FULL_CACHE, 90.0, 30, 0.0)]
    records += [text("a", "SnapKV", 30.0, 10, 2.0), text("b", "SnapKV", 90.0, 30, 6.0)]
    row = rows_of(records)["SnapKV", "text"]
    assert row.metric == "perplexity"
    assert row.base == pytest.approx(math.exp(120 / 40))
    assert row.retention_base == pytest.approx(math.exp(10 / 40))
    assert row.besides["kl_base"] == pytest.approx(8 / 40)
    assert row.trained is row.difference is row.trained_interval is None


def test_recalled_words_weigh_their_tokens_and_have_a_gap_to_the_full_cache():
    def text(case, press, variant, nll, tokens):
        record = needle(case, press, None, variant, task="text") | {"nll": 10.0, "tokens": 10, "kl": 0.0}
        return record | {"recalled_nll": nll, "recalled_tokens": tokens}

    full, pressed = {"a": (1.0, 1), "b": (7.0, 3), "c": (0.0, 0)}, {"a": (2.0, 1), "b": (14.0, 3), "c": (0.0, 0)}
    records = [
        text(case, press, variant, nll * scale, tokens)
        for variant, scale in (("base", 1.0), ("trained", 0.5))
        for press, cases in ((FULL_CACHE, full), ("SnapKV", pressed))
        for case, (nll, tokens) in cases.items()
    ]
    rows = rows_of(records)
    found = rows["SnapKV", "text"].besides
    assert found["recalled_tokens"] == 4, "a window without recalled words has no weight"
    assert (found["recalled_words_base"], found["recalled_words_trained"]) == (4.0, 2.0)
    gaps = [found[f"recalled_words_gap_{name}"] for name in ("base", "trained", "difference")]
    assert gaps == [2.0, 1.0, -1.0]
    low, high = found["recalled_words_gap_difference_interval"]
    assert -1.2 < low < -1 < high < -0.4, "the same windows are drawn for all four"
    assert found["perplexity_gap_base"] == found["perplexity_gap_difference"] == 0
    assert "recalled_words_base" in rows[FULL_CACHE, "text"].besides
    assert not any("gap" in name for name in rows[FULL_CACHE, "text"].besides)


def test_only_cases_of_both_sides_are_pairs_and_the_rest_is_counted():
    records = [needle(case, "SnapKV", 1.0) for case in "abc"] + [
        needle(case, "SnapKV", 0.0, "trained") for case in "bcd"
    ]
    records += [needle(case, FULL_CACHE, 1.0, variant) for case in "cd" for variant in ("base", "trained")]
    row = rows_of(records)["SnapKV", "niah_single_1"]
    assert (row.cases, row.dropped, row.retention_cases) == (2, 2, 1)
    assert (row.base, row.trained, row.retention_base, row.retention_trained) == (1.0, 0.0, 1.0, 0.0)


def test_no_common_case_is_an_error_and_no_score():
    row = rows_of([needle("a", "SnapKV", 1.0), needle("b", "SnapKV", 1.0, "trained")])["SnapKV", "niah_single_1"]
    assert (row.base, row.trained, row.cases, row.dropped) == (None, None, 0, 2)
    assert "no case was measured in both" in row.error


def test_retention_is_undefined_where_the_full_cache_finds_nothing():
    row = rows_of([needle("a", FULL_CACHE, 0.0), needle("a", "SnapKV", 0.0)])["SnapKV", "niah_single_1"]
    assert row.base == 0
    assert row.retention_base is row.retention_base_interval is None


def test_a_case_that_is_there_twice_counts_once():
    row = rows_of([needle("a", "SnapKV", 1.0)] * 2 + [needle("b", "SnapKV", 0.0)])["SnapKV", "niah_single_1"]
    assert (row.cases, row.base) == (2, 0.5)


def test_several_tasks_are_also_pooled_and_share_no_case():
    records = [needle("a", "SnapKV", 1.0, task="vt"), needle("a", "SnapKV", 0.0, task="cwe")]
    rows = rows_of(records)
    assert rows["SnapKV", ALL_RETRIEVAL].base == 0.5
    assert rows["SnapKV", ALL_RETRIEVAL].cases == 2
    assert [row.task for row in headline(list(rows.values()))] == [ALL_RETRIEVAL]
    assert (None, ALL_RETRIEVAL) not in rows_of(records[:1])


def test_fractions_have_bootstrap_intervals():
    row = rows_of([needle(str(n), "SnapKV", n / 4) for n in range(5)])["SnapKV", "niah_single_1"]
    assert row.base == 0.5
    assert 0 < row.base_interval[0] < 0.5 < row.base_interval[1] < 1


def test_the_full_cache_comes_first_then_presses_as_met_and_ratios_rising():
    records = [needle("a", "TOVA", 1.0, ratio=0.7), needle("a", "SnapKV", 1.0, ratio=0.5), needle("a", "TOVA", 1.0)]
    records += [needle("a", FULL_CACHE, 1.0), needle("a", "hosted M", 1.0, ratio=0.0)]
    conditions = [
        (row.condition.press, row.condition.compression_ratio) for row in summary_rows(sorted_records(records))
    ]
    assert conditions == [(FULL_CACHE, 0.0), ("TOVA", 0.5), ("TOVA", 0.7), ("SnapKV", 0.5), ("hosted M", 0.0)]
    assert press_name(None) == FULL_CACHE


def test_the_full_cache_of_the_same_prefill_is_taken_else_the_dense_one():
    chunks = {"prefill": "chunks of 8"}
    records = [needle("a", FULL_CACHE, 1.0), needle("a", FULL_CACHE, 0.5, **chunks)]
    records += [needle("a", "SnapKV", 0.5, **chunks), needle("a", "SnapKV", 0.5, prefill="decoding")]
    rows = {
        row.condition.prefill: row for row in summary_rows(sorted_records(records)) if row.condition.press == "SnapKV"
    }
    assert rows["chunks of 8"].retention_base == 1
    assert rows["decoding"].retention_base == 0.5


def test_a_failure_has_a_row_in_every_task_with_its_count():
    failure = {"task": "text", "variant": "trained", "press": "SnapKV", "compression_ratio": 0.5, "error": "Oops:\n no"}
    records = [needle("a", FULL_CACHE, 1.0, "trained"), failure, failure]
    rows = rows_of(records)
    for task, metric in (("niah_single_1", "needle_accuracy"), ("text", "perplexity")):
        row = rows["SnapKV", task]
        assert (row.metric, row.base, row.trained, row.cases) == (metric, None, None, 0)
        assert row.error == "trained, text: Oops: no (2 times)"
    assert rows[FULL_CACHE, "niah_single_1"].error is None


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no rows"),
        ([needle("a", "SnapKV", 1.0, "before")], "variant 'before' must be one of base, trained"),
        ([needle("a", "SnapKV", math.nan)], r"'a' under SnapKV 0\.50: exact is nan"),
    ],
)
def test_bad_records_are_refused(records, message):
    with pytest.raises(ValueError, match=message):
        sorted_records(records)


def test_labels():
    assert Condition("SnapKV", 0.5, "chunks of 8").label == "SnapKV 0.50, chunks of 8"
    assert Condition(FULL_CACHE, 0.0).label == FULL_CACHE
    assert Condition("hosted M", 0.0, "hosted").label == "hosted M"
    assert not Condition("hosted M", 0.0).evicts
