"""All checks and measurements that need a GPU, in at most eight minutes on one: tests marked cuda, and costs of steps.

Run from the checkout: ``python benchmarks/gpu.py``, without network. Each part (gpu_parts.py) runs in its own process
with a time limit and writes a file to ``--output``; a second run reuses finished parts and runs the others.
``--only PART ...`` selects parts. At the end one JSON file, gpu.json, and one table are written, to be copied to
docs/log/speed.md. ``--tiny`` runs every part on the CPU with tiny models, in this process.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

Result = dict[str, Any]
LIMITS = {
    "tests": 75,
    "quickstart": 140,
    "step": 75,
    "kv_dropout": 40,
    "four_bit": 35,
    "sharded": 35,
    "blocks": 35,
    "evaluation": 45,
}
"""Part -> time limit in seconds; 480 in total."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing parts and print the table; return 0 if every part is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/gpu"))
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with tiny models")
    given = parser.parse_args(arguments)
    if not given.tiny and not _has_gpu():
        print("PyTorch finds no GPU: --tiny runs every part on the CPU", file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    results = {part: finished_or_run(part, given.output, given.tiny) for part in given.only}
    (given.output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(json.dumps({"benchmark": "gpu", "parts": results}))
    return int(any("error" in result for result in results.values()))


def finished_or_run(part: str, output: Path, tiny: bool) -> Result:
    """A part's result, from an earlier run with the same settings or from a new one."""
    path = output / f"{part}.json"
    if path.exists():
        kept: Result = json.loads(path.read_text())
        if "error" not in kept and kept["tiny"] == tiny:
            return kept
    start = time.perf_counter()
    result = here(part) if tiny else in_a_process(part, path.with_suffix(".log"), LIMITS[part])
    result |= {"tiny": tiny, "seconds": round(time.perf_counter() - start, 1)}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
    return result


def here(part: str) -> Result:
    """Run a part on the CPU with a tiny model."""
    from gpu_parts import PARTS

    return {"figures": PARTS[part]("cpu", True)}


def in_a_process(part: str, log: Path, limit: float) -> Result:
    """Run a part on the GPU, stopped after ``limit`` seconds; its output goes to ``log``."""
    command = [sys.executable, str(Path(__file__).parent / "gpu_parts.py"), part]
    with log.open("w") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {limit:g} s, see {log}"}
    lines = log.read_text().splitlines()
    if code != 0 or not lines:
        return {"error": f"exit code {code}, see {log}: {lines[-1][:200] if lines else 'no output'}"}
    return {"figures": json.loads(lines[-1])}


def table(results: dict[str, Result]) -> str:
    """A Markdown table with a row per figure."""
    lines = ["| part | figure | value |", "|---|---|---|"]
    for part, result in results.items():
        figures = result.get("figures") or {"not done": result.get("error", "")}
        lines += [f"| {part} | {name} | {_shown(value)} |" for name, value in figures.items()]
        lines.append(f"| {part} | seconds | {result['seconds']:g} |")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
