"""The remaining time of work, some of which an earlier run may have finished."""

from collections.abc import Sequence

import pytest

from sparsekv_pl.evaluation.pace import BatchShare, Pace


def lines(
    reports: Sequence[tuple[float, float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> list:
    times = iter([0.0, *(now for now, _ in reports)])
    monkeypatch.setattr(Pace, "clock", staticmethod(lambda: next(times)))
    pace = Pace("evaluation", "batches", 100)
    for _, done in reports:
        pace.reached(done)
    return capsys.readouterr().out.splitlines()


def test_finished_work_does_not_promise_that_the_rest_is_as_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [(0.01, 1), (0.4, 50), (60.4, 52), (100.4, 56), (1140.0, 100)]
    assert lines(reports, monkeypatch, capsys) == [
        "evaluation: 1 of 100 batches",  # in its first seconds
        "evaluation: 52 of 100 batches, 24 min left",  # 30 s each; 60 s for 52 would leave one minute
        "evaluation: 56 of 100 batches, 12 min left",  # 100 s for 6
        "evaluation: 100 of 100 batches",
    ]


def test_one_slow_piece_does_not_stand_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [*((10.0 * done, done) for done in range(1, 20)), (190 + 40, 19.1)]
    *_, last = lines(reports, monkeypatch, capsys)
    assert last == "evaluation: 19 of 100 batches, 16 min left"  # 230 s for 19.1; 400 s a batch would be 9 hours


def test_reports_without_progress_cost_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines([(10.0, 1), (50.0, 1), (90.0, 2)], monkeypatch, capsys)[1:] == [
        "evaluation: 1 of 100 batches, 16 min left",
        "evaluation: 2 of 100 batches, 1 h 14 min left",
    ]


def test_a_batch_is_done_by_time_as_its_first_piece_holds_the_prefill() -> None:
    share = BatchShare(100.0)
    found = [share.after(done, 5, now) for done, now in ((1, 120.0), (2, 125.0), (3, 130.0), (5, 140.0))]
    assert found == [0.0, 25 / 40, 30 / 40, 1.0]
    finished_before = BatchShare(0.0)
    assert [finished_before.after(done, 4, 0.0) for done in (1, 2, 4)] == [0.0, 0.5, 1.0]
