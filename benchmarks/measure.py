"""Functions for all benchmarks: peak memory in a fresh process, times taken in turn, and printing both.

Linux only: the peak is the kernel's (``VmHWM``), which misses nothing, unlike a sampling thread.
"""

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # data is a package of the checkout, not of an installation


class Ratio(NamedTuple):
    """Ratios of one function's cost to another's, by round."""

    median: float
    low: float
    high: float


def peak_memory(script: str | Path, function: str, *args: object) -> int:
    """Bytes by which a step's peak resident memory exceeds the memory before it, in a fresh process.

    ``function``, a top-level function of the Python file ``script`` (usually the benchmark's own ``__file__``), is
    called with JSON-able ``args``, builds the inputs and returns the step, a callable without arguments.
    """
    command = [sys.executable, __file__, str(script), function, json.dumps(args)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{function}{args} failed in its process:\n{finished.stderr}")
    return int(finished.stdout.splitlines()[-1])


def paired_times(
    step: Callable[[], object],
    reference: Callable[[], object],
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time of ``step`` over that of ``reference``, after a warm-up and in turn, so that other load slows both."""
    seconds(step), seconds(reference)
    ratios = [seconds(step, clock) / seconds(reference, clock) for _ in range(rounds)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def report(
    benchmark: str,
    rows: Sequence[Mapping[str, object]],
    ratios: Mapping[str, float],
    floors: Mapping[str, float],
    goals: Mapping[str, float],
) -> None:
    """Print ``rows`` as a table with the first row's keys as header, and one JSON object as the last line.

    Every ratio is a cost over its reference, so smaller is better. A goal is an upper limit; a floor is a lower bound
    for any implementation.
    """
    header = list(rows[0])
    table = [header, *([str(row[column]) for column in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
    result = {"benchmark": benchmark, "ratios": rounded, "floors": dict(floors), "goals": dict(goals)}
    print(json.dumps(result))


def seconds(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Duration of ``step`` in seconds."""
    start = clock()
    step()
    return clock() - start


def _memory_status(field: str) -> int:
    """Bytes of this process's memory according to Linux; ``field`` is VmRSS (current) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this measurement needs Linux")


def _measure_here(script: str, function: str, args: Sequence[object]) -> int:
    spec = importlib.util.spec_from_file_location("benchmark", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    step = getattr(module, function)(*args)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which includes building the inputs
    before = _memory_status("VmRSS")
    step()
    return _memory_status("VmHWM") - before


if __name__ == "__main__":
    print(_measure_here(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
