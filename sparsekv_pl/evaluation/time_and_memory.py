"""Time and memory of a run by phase: loading, tokenising, prefill, answering."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import torch

SAMPLE_SECONDS = 0.05
"""Seconds between two samples of the process's memory, where the kernel's own peak cannot be reset."""
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"
"""Written to /proc/pid/clear_refs to reset the highest resident size (proc(5), Linux 4.0)."""

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Run ``work``; return its outcome and the seconds it took. A GPU's queue is emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    outcome = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return outcome, time.perf_counter() - start


class _Peak(Protocol):
    """The highest resident memory of this process since the object was made."""

    source: str

    def bytes(self) -> int: ...
    def stop(self) -> None: ...


class _KernelPeak:
    """The peak recorded by Linux (VmHWM), reset when the phase starts. Exact and free."""

    source = "kernel"

    def __init__(self) -> None:
        CLEAR_REFS.write_text(RESET_PEAK)
        self.bytes()  # an OSError here, not at the end of a phase

    def bytes(self) -> int:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"{STATUS} has no VmHWM")

    def stop(self) -> None:
        pass


class _SampledPeak:
    """The peak sampled by a thread every ``SAMPLE_SECONDS``; shorter peaks are missed."""

    source = "sampled"

    def __init__(self) -> None:
        self._process, self._highest, self._stopped = psutil.Process(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)
        self.bytes()
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.bytes()

    def bytes(self) -> int:
        self._highest = max(self._highest, self._process.memory_info().rss)
        return self._highest

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _peak() -> _Peak:
    try:
        return _KernelPeak()
    except OSError:  # not Linux, or a container that forbids it
        return _SampledPeak()


class Phases:
    """Measures named phases, one after the other.

    >>> phases = Phases()
    >>> with phases("load"):
    ...     weights = torch.zeros(10)
    >>> phases.records()[0]["phase"]
    'load'
    """

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._current: _Peak | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block as a phase ``name``, also if it fails.

        Raises
        ------
        RuntimeError
            Inside another phase: a process has only one peak to reset.
        """
        if self._current is not None:
            raise RuntimeError(f"phase {name!r} was started inside another: phases follow each other")
        devices = range(torch.cuda.device_count())
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        peak = self._current = _peak()
        started = time.perf_counter()
        try:
            yield
        finally:
            for device in devices:
                torch.cuda.synchronize(device)  # GPU work that was only queued belongs to this phase
            seconds = time.perf_counter() - started
            self._records.append({"phase": name, "seconds": seconds, **self._memory(peak), **_gpu_memory()})
            peak.stop()
            self._current = None

    def records(self) -> list[dict[str, Any]]:
        """One dict per finished phase, in order.

        ``phase``, ``seconds``, ``rss_bytes`` (at its end), ``peak_rss_bytes`` (while it ran), ``peak_source``
        ("kernel" or "sampled"), and per GPU ``gpu0_allocated_bytes`` (at its end) and ``gpu0_peak_bytes``.
        """
        return [dict(record) for record in self._records]

    def scalars(self) -> dict[str, float]:
        """``phase/measure`` -> number, for loggers. For a phase that ran twice: summed times and the highest peak."""
        totals: dict[str, float] = {}
        for record in self._records:
            for measure, value in record.items():
                if isinstance(value, str):
                    continue
                key, value = f"{record['phase']}/{measure}", float(value)
                if measure == "seconds":
                    totals[key] = totals.get(key, 0.0) + value
                else:
                    totals[key] = max(totals.get(key, value), value) if "peak" in measure else value
        return totals

    def peak_bytes(self) -> int:
        """The peak memory in bytes of the current phase so far, else of the last one.

        The sum over GPUs if there are any, otherwise resident memory of the process.

        Raises
        ------
        RuntimeError
            Before the first phase.
        """
        if self._current is not None:
            memory = {**self._memory(self._current), **_gpu_memory()}
        elif self._records:
            memory = self._records[-1]
        else:
            raise RuntimeError("no phase has been measured yet: ask inside one, or after it")
        gpus = [value for key, value in memory.items() if key.startswith("gpu") and key.endswith("_peak_bytes")]
        return sum(gpus) if gpus else memory["peak_rss_bytes"]

    @staticmethod
    def _memory(peak: _Peak) -> dict[str, Any]:
        return {
            "rss_bytes": psutil.Process().memory_info().rss,
            "peak_rss_bytes": peak.bytes(),
            "peak_source": peak.source,
        }


def _gpu_memory() -> dict[str, int]:
    memory = {}
    for device in range(torch.cuda.device_count()):
        memory[f"gpu{device}_allocated_bytes"] = torch.cuda.memory_allocated(device)
        memory[f"gpu{device}_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return memory
