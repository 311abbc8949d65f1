"""What every benchmark shares: peak memory in a fresh process, times taken in turn, one way to print both.

Linux only: the peak is the kernel's own (``VmHWM``), which sees all that a sampling thread would miss.
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
    """Cost of one function over another's, by round."""

    median: float
    low: float
    high: float


def peak_memory(script: str | Path, function: str, *args: object) -> int:
    """Bytes by which a step's peak resident memory exceeds what was resident before it, in a fresh process.

    ``function``, defined at the top of the Python file ``script`` (usually the benchmark's own ``__file__``),
    is called with ``args`` (what JSON can carry), builds the inputs and returns the step, a callable without
    arguments.
    """
    command = [sys.executable, __file__, str(script), function, json.dumps(args)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{function}{args} failed in its own process:\n{finished.stderr}")
    return int(finished.stdout.splitlines()[-1])


def paired_times(step: Callable[[], object], reference: Callable[[], object], rounds: int = 3) -> Ratio:
    """Time of ``step`` over that of ``reference``, in turn, as a busy machine slows both; after a warm-up."""
    seconds(step), seconds(reference)
    ratios = [seconds(step) / seconds(reference) for _ in range(rounds)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def report(
    benchmark: str,
    rows: Sequence[Mapping[str, object]],
    ratios: Mapping[str, float],
    floors: Mapping[str, float],
    goals: Mapping[str, float],
) -> None:
    """Print ``rows`` as a table, headed by the first row's keys, and, as the last line, one JSON object.

    Every ratio is a cost over its reference: smaller is better, a goal is an upper limit and a floor what no
    implementation can beat.
    """
    header = list(rows[0])
    table = [header, *([str(row[column]) for column in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
    result = {"benchmark": benchmark, "ratios": rounded, "floors": dict(floors), "goals": dict(goals)}
    print(json.dumps(result))


def seconds(step: Callable[[], object]) -> float:
    """How long ``step`` takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _memory_status(field: str) -> int:
    """Bytes that Linux states for this process; field is VmRSS (now) or VmHWM (the peak)."""
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
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that building the inputs reached
    before = _memory_status("VmRSS")
    step()
    return _memory_status("VmHWM") - before


if __name__ == "__main__":
    print(_measure_here(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
