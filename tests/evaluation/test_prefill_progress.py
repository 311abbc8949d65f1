"""The lines of a prefill's progress outside a terminal say how long the rest takes, as long as there is one."""

import io

import pytest
from rich.console import Console

from sparsekv_pl.evaluation import prefill_progress
from sparsekv_pl.evaluation.prefill_progress import PrefillProgress


def test_the_lines_say_what_is_left_until_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(prefill_progress.time, "monotonic", lambda: now[0])
    written = io.StringIO()
    with PrefillProgress(1_200, 0, Console(file=written, width=100)) as progress:
        for now[0], tokens in ((10.0, 100), (60.0, 600), (120.0, 1_200)):
            progress.reached(tokens)
    assert written.getvalue().splitlines() == [
        "600 of 1,200 tokens read, 10/s, 1 min left",
        "1,200 of 1,200 tokens read, 10/s",
    ]
