"""Phases: time and memory belong to one phase with either way of finding the peak, and no thread outlives it."""

import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from sparsekv_pl.evaluation import time_and_memory as monitoring
from sparsekv_pl.evaluation.time_and_memory import Phases

MIB = 2**20
SIZE = 64 * MIB


@pytest.fixture(params=["kernel", "sampled"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Both ways; without a writable clear_refs the sampling thread takes over."""
    if request.param == "sampled":
        monkeypatch.setattr(monitoring, "CLEAR_REFS", tmp_path / "no" / "such" / "file")
    elif psutil.LINUX:
        assert monitoring.CLEAR_REFS.exists()
    return request.param


def allocate(seconds: float = 0.2) -> None:
    """Hold ``SIZE`` bytes more for a while; the memory is returned to the system, not to an arena."""
    held = torch.ones(SIZE, dtype=torch.uint8)
    time.sleep(seconds)
    del held


def test_the_peak_is_the_phases_own(source: str) -> None:
    before = psutil.Process().memory_info().rss
    phases = Phases()
    with phases("large"):
        allocate()
    with phases("small"):
        time.sleep(0.06)
    large, small = phases.records()
    assert (large["phase"], small["phase"]) == ("large", "small")
    assert large["peak_source"] == small["peak_source"] == source
    assert large["peak_rss_bytes"] - before > 0.9 * SIZE
    assert large["peak_rss_bytes"] - large["rss_bytes"] > 0.9 * SIZE
    assert small["peak_rss_bytes"] - small["rss_bytes"] < 0.1 * SIZE
    assert 0.2 <= large["seconds"] < 2
    assert 0.06 <= small["seconds"] < 0.2


def test_the_ledgers_peak_follows_the_current_phase(source: str) -> None:  # noqa: ARG001
    phases = Phases()
    with pytest.raises(RuntimeError, match="no phase has been measured yet"):
        phases.peak_bytes()
    with phases("load"):
        allocate()
        during = phases.peak_bytes()
    assert during - phases.records()[0]["rss_bytes"] > 0.9 * SIZE
    assert phases.peak_bytes() == phases.records()[0]["peak_rss_bytes"]
    with phases("answer"):
        assert phases.peak_bytes() < during - 0.5 * SIZE


def test_no_thread_runs_on(source: str) -> None:
    threads = set(threading.enumerate())
    phases = Phases()
    with phases("one"):
        assert len(set(threading.enumerate()) - threads) == (source == "sampled")
    assert set(threading.enumerate()) == threads
    with pytest.raises(ZeroDivisionError), phases("failing"):
        _ = 1 / 0
    assert set(threading.enumerate()) == threads
    assert [record["phase"] for record in phases.records()] == ["one", "failing"]


def test_phases_do_not_nest() -> None:
    phases = Phases()
    with phases("outer"), pytest.raises(RuntimeError, match="'inner' was started inside another"), phases("inner"):
        pass
    with phases("next"):
        pass
    assert [record["phase"] for record in phases.records()] == ["outer", "next"]


def test_scalars_add_times_and_keep_the_highest_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = Phases()
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        with phases("prefill"):
            pass
    phases._records[0] |= {"rss_bytes": 70, "peak_rss_bytes": 100}
    phases._records[1] |= {"rss_bytes": 60, "peak_rss_bytes": 90}
    assert phases.scalars() == {"prefill/seconds": 5.0, "prefill/rss_bytes": 60.0, "prefill/peak_rss_bytes": 100.0}
    assert "peak_source" not in str(phases.scalars())


def test_gpu_memory_is_recorded_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: the calls are stood in for, the arithmetic is not."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", device)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 + device)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 200 + device)
    phases = Phases()
    with phases("prefill"):
        assert phases.peak_bytes() == 401
    record = phases.records()[0]
    assert [record[f"gpu{device}_{kind}_bytes"] for device in (0, 1) for kind in ("allocated", "peak")] == [
        100,
        200,
        101,
        201,
    ]
    assert calls == [("reset", 0), ("reset", 1), ("wait", 0), ("wait", 1)]
    assert phases.peak_bytes() == 401
