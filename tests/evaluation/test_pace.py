"""The remaining time of work, some of which an earlier run may have finished."""

import pytest

from sparsekv_pl.evaluation.pace import Pace


def test_finished_work_does_not_promise_that_the_rest_is_as_fast(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 1.0, 4.0, 60.0, 100.0, 1140.0])
    monkeypatch.setattr(Pace, "clock", staticmethod(lambda: next(times)))
    pace = Pace("evaluation", "batches", 100)
    for done in (1, 50, 52, 56, 100):
        pace.reached(done)
    assert capsys.readouterr().out.splitlines() == [
        "evaluation: 1 of 100 batches",  # in its first seconds
        "evaluation: 52 of 100 batches, 22 min left",  # 28 s each; 60 s for 52 would leave one minute
        "evaluation: 56 of 100 batches, 7 min left",  # 10 s each
        "evaluation: 100 of 100 batches",
    ]
