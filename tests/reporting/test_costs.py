"""Tables of kept pairs, cost and stability."""

import pytest

from sparsekv_pl.reporting.costs import ledger_rows, stability_rows
from sparsekv_pl.reporting.sorted_records import sorted_records

FAILURE = {"variant": "base", "press": "SnapKV", "compression_ratio": 0.9, "error": "Oops"}


def test_ledger_counts_pairs_bytes_and_tokens_per_second_by_length(make_records):
    records = make_records(lengths=(512, 1024), presses=[("SnapKV", True)], ratios=(0.5,))
    full, longer, half, *rest = ledger_rows(sorted_records(records))
    assert [line["length"] for line in (full, longer, half)] == [512, 1024, 512]
    assert (half["kept_pairs"], half["kept_share"], half["memory"]) == (256, 0.5, "freed")
    assert half["kv_bytes"] == 256 * 23_040
    assert half["prefill_tokens_per_second"] == pytest.approx(900)
    assert half["decode_tokens_per_second"] == pytest.approx(40)  # of the answers: text decodes nothing
    assert full["memory"] is None
    assert len(rest) == 1


def test_masked_memory_is_reported(make_records):
    records = [record | {"freed": False} for record in make_records(ratios=(0.5,))]
    assert ledger_rows(sorted_records(records))[-1]["memory"] == "only masked"
    records[-1]["freed"] = True
    assert ledger_rows(sorted_records(records))[-1]["memory"] == "freed or masked"


def test_failures_are_lines_and_records_without_a_ledger_are_none(make_records):
    records = [*make_records(), FAILURE]
    failed = [line for line in ledger_rows(sorted_records(records)) if "error" in line]
    assert [line["compression_ratio"] for line in failed] == [0.9]
    bare = [{k: v for k, v in record.items() if k != "kept_pairs"} for record in records]
    assert ledger_rows(sorted_records(bare)) == []


def test_stability_tells_mean_and_worst_case(make_records):
    records = make_records(tasks=("text",), stability=True, ratios=(0.5,), variants=("base",))
    snap = [record for record in records if record["press"] == "SnapKV"]
    for place, record in enumerate(snap):
        record |= {"min_retained": place / 10, "retained_variance": place / 100}
    (line,) = [line for line in stability_rows(sorted_records([*snap, FAILURE])) if "error" not in line]
    assert (line["min_retained"], line["min_retained_worst"]) == (pytest.approx(0.15), 0)
    assert (line["retained_variance"], line["retained_variance_worst"]) == (pytest.approx(0.015), 0.03)
    assert stability_rows(sorted_records(make_records())) == []
