"""Train every ablation under configs/train/ablations, measure all on the same cases, and print one table.

Run from the checkout: ``make ablations``, or ``python benchmarks/ablations.py --only loss_lm selection_weight_1``. One
takes about ten minutes on one core. Finished ablations are skipped, so a stopped run can be continued.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START = ROOT / "configs" / "quickstart.yaml"
FOLDER = ROOT / "configs" / "train" / "ablations"
EVALUATION = ROOT / "configs" / "evaluate" / "ablations.yaml"
BASE = "base"

Row = dict[str, Any]


def names() -> list[str]:
    """Names of the ablations, their common base first."""
    return [BASE, *sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != BASE)]


def configs_of(name: str) -> list[Path]:
    """Configuration files of an ablation's training; each overrides those before it."""
    return [START, FOLDER / f"{BASE}.yaml", *([] if name == BASE else [FOLDER / f"{name}.yaml"])]


def train_command(name: str, output: Path) -> list[str]:
    """The command that trains an ablation."""
    configs = [argument for path in configs_of(name) for argument in ("--config", str(path))]
    return [sys.executable, str(ROOT / "train.py"), "fit", *configs, f"--name={output.absolute()}"]


def evaluate_command(output: Path) -> list[str]:
    """The command that measures an ablation."""
    configs = ["--config", str(EVALUATION)]
    return [sys.executable, str(ROOT / "evaluate.py"), "test", *configs, f"--name={output.absolute()}"]


def run(name: str, output: Path, threads: int) -> None:
    """Train and measure one ablation, unless that is done. Its log lies beside its output."""
    own = output / name
    own.mkdir(parents=True, exist_ok=True)
    if not (own / "final").exists():
        _logged(train_command(name, own), own / "train.log", threads)
    if name != BASE:  # the untrained model is the same for all and measured once
        (own / "results").mkdir(exist_ok=True)
        for path in (output / BASE / "results").glob("base_*.jsonl"):
            if not (own / "results" / path.name).exists():
                shutil.copy(path, own / "results")
    if not (own / "report.json").exists():
        _logged(evaluate_command(own), own / "evaluate.log", threads)
    print(f"{name}: done", flush=True)


def _logged(command: Sequence[str], log: Path, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: see {log}")


def table(output: Path, finished: Sequence[str]) -> list[Row]:
    """One row for the untrained model and one per ablation: needles found, perplexities, minutes of training."""
    rows = []
    for name in finished:
        report = json.loads((output / name / "report.json").read_text())
        if not rows:
            rows.append({"ablation": "(untouched)", "minutes": ""} | _cells(report["rows"], "base"))
        minutes = round(report["training"]["seconds"] / 60, 1)
        rows.append({"ablation": name, "minutes": minutes} | _cells(report["rows"], "trained"))
    return rows


def _cells(rows: Sequence[Row], side: str) -> Row:
    cells = {}
    for row in rows:
        column = f"{row['press']} {row['compression_ratio']:g}" if row["press"] != "full cache" else "full cache"
        if row["error"]:
            cells[column] = "failed"
        elif row["metric"] == "needle_accuracy":
            cells[column] = f"{round(row[side] * row['cases'])}/{row['cases']}"
        elif row["press"] in ("full cache", "ExpectedAttention") and row["metric"] == "perplexity":
            cells[f"perplexity {column}"] = f"{row[side]:.2f}"
    return cells


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with the first row's keys as header."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([str(row.get(column, "")) for column in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    """Run the requested ablations and print the table of all finished ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), help="run only these ablations")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "ablations", help="output folder")
    parser.add_argument("--jobs", type=int, default=1, help="ablations at a time, which share the cores")
    given = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    run(BASE, given.output, threads)
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {name: pool.submit(run, name, given.output, threads) for name in given.only if name != BASE}
    failed = {name: ended.exception() for name, ended in runs.items() if ended.exception() is not None}
    finished = [name for name in names() if (given.output / name / "report.json").exists()]
    rendered = as_markdown(table(given.output, finished))
    (given.output / "table.md").write_text(rendered)
    print(rendered)
    if failed:
        sys.exit("\n".join(f"{name} failed: {error}" for name, error in failed.items()))


if __name__ == "__main__":
    main()
