"""Run the Dockerfile's COPY and pip steps in an empty folder without a container engine, then a training step.

Run from the checkout: ``python benchmarks/container_steps.py``. It downloads what the image would and takes minutes.
Steps that need root (the compiler, the user) are skipped. Prints PASS or FAIL.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = ".venv/bin/python train.py fit --config configs/quickstart.yaml --trainer.fast_dev_run=true"
"""One step and one validation batch of the embedded model, with only the copied and installed files."""


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, rest) in order, without comments and RUN's own options, with continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    pairs = [line.partition(" ")[::2] for line in joined.splitlines() if line]
    return [(name, re.sub(r"^(--mount=\S+ )+", "", rest)) for name, rest in pairs]


def copied(sources: Sequence[str]) -> list[str]:
    """The files and folders of a COPY; "." means all that .dockerignore, a list of exceptions, lets through."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    return [path for source in sources for path in (allowed if source == "." else [source])]


def copy(rest: str, folder: Path) -> None:
    """Copy the files of ``COPY rest`` into ``folder``."""
    *sources, target = rest.split()
    for path in copied(sources):
        to = folder / target if (ROOT / path).is_dir() else folder / target / Path(path).name
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, to / path, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, to)


def timed(command: str, folder: Path, environment: dict[str, str]) -> bool:
    """Run a shell command and print its time, and the end of its output if it failed; return whether it succeeded."""
    start = time.perf_counter()
    done = subprocess.run(["sh", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True)
    print(f"{time.perf_counter() - start:6.1f} s  {'ok' if done.returncode == 0 else 'FAILED'}  {command}", flush=True)
    if done.returncode:
        print((done.stdout + done.stderr)[-3000:])
    return done.returncode == 0


def follow(folder: Path) -> bool:
    """Run the steps up to the first failure; return whether all succeeded."""
    own = Path(sys.base_prefix) / "bin"  # without the virtual environment that runs this script
    environment = os.environ | {"PATH": f"{own}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    for name, rest in instructions((ROOT / "Dockerfile").read_text()):
        if name == "ARG":
            environment.setdefault(*rest.split("=", 1))
        elif name == "COPY":
            copy(rest, folder)
        elif name == "RUN" and " pip " not in rest:
            print(f"   not run      {rest}")
        elif name == "RUN" and not all(timed(step, folder, environment) for step in rest.split(" && ")):
            return False
    return timed(CHECK, folder, environment | {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    """Run the steps in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        passed = follow(Path(folder))
    print("PASS" if passed else "FAIL")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
