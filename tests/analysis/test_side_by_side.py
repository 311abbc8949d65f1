"""The table of one case in the terminal: both answers, what was kept, and failures."""

from typing import Any

import pytest

from sparsekv_pl.analysis.side_by_side import side_by_side
from sparsekv_pl.evaluation.view_pages import is_right
from sparsekv_pl.reporting.console import show


def record(variant: str, press: str, ratio: float, **measured: Any) -> dict[str, Any]:
    kept = 1000 * (1 - ratio)
    return {
        **{"case": "a", "variant": variant, "press": press, "compression_ratio": ratio, "prefill": "dense"},
        **{"kept_pairs": kept, "kv_bytes": int(kept * 23_040), "question": "\nWho?", "answer_prefix": "It was"},
        **{"answers": ["Ada"], "prefill_seconds": 2.5, "eviction_seconds": 0.25, "decode_seconds": 1.0},
        **measured,
    }


def test_a_case_is_shown_side_by_side(capsys: Any) -> None:
    error = {"case": "a", "variant": "trained", "press": "Knorm", "compression_ratio": 0.5, "error": "[/red] broken"}
    records = [
        record("base", "full cache", 0.0, answer="Ada", exact=1.0),
        record("base", "Knorm", 0.5, answer="[b]Bob\n or so", exact=0.0),
        record("trained", "full cache", 0.0, answer="Ada.", exact=1.0),
        error,
    ]
    show(*side_by_side(records))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Who? ... It was (expected: Ada)"
    assert lines[1] == "press removed pairs MB base trained seconds"
    assert lines[3] == "full cache 0% 1000 23.0 ✓ Ada ✓ Ada. 1.2 / 1.2"
    assert lines[4] == "Knorm 50% 500 11.5 ✗ [b]Bob or so [/red] broken 1.2"
    assert " ".join(lines[5:]).endswith("after a prefill of 2.5 / 2.5")


def test_a_base_alone_and_a_question_without_an_expected_answer(capsys: Any) -> None:
    show(*side_by_side([record("base", "full cache", 0.0, answer="", answers=[])]))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Who? ... It was" and lines[1].endswith("MB base seconds")
    assert lines[3] == "full cache 0% 1000 23.0 (empty) 1.2"


@pytest.mark.parametrize(
    ("prefix", "exact", "substring", "right"),
    [("It was", 1.0, 1.0, True), ("It was", 0.0, 1.0, False), ("", 0.0, 1.0, True), ("", 0.0, 0.5, False)],
)
def test_an_answer_is_right_where_it_had_to_be(prefix: str, exact: float, substring: float, right: bool) -> None:
    assert is_right({"answer_prefix": prefix, "exact": exact, "substring": substring}) is right
    assert is_right({"answer_prefix": prefix}) is None
