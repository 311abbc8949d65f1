"""Time of ``python train.py --help`` over importing Lightning's own command line, its lower bound.

Run from the checkout: ``python benchmarks/cli_help.py``.
"""

import subprocess
import sys
import time

from measure import report

SECONDS = 8.0
"""Limit for the whole command, in seconds."""


def _seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Time both in turn, after a warm-up, and print the ratio."""
    commands = {"help": ("train.py", "--help"), "import": ("-c", "import lightning.pytorch.cli")}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(4):
        for name, command in commands.items():
            times[name].append(_seconds(*command))
    help_seconds, import_seconds = (sorted(times[name][1:])[1] for name in commands)
    rows = [
        {"command": "train.py --help", "seconds": f"{help_seconds:.1f}", "Lightning alone": f"{import_seconds:.1f}"}
    ]
    ratios = {"help over limit": help_seconds / SECONDS, "help over Lightning": help_seconds / import_seconds}
    report("cli_help", rows, ratios, {"help over Lightning": 1.0}, {"help over limit": 1.0})


if __name__ == "__main__":
    main()
