"""The Slurm scripts run by bash, and stand-ins for what they call."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from configs.cluster.submit import TRAININGS

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs" / "cluster"
SCRIPTS = sorted(CLUSTER.glob("*.sbatch"))
QWEN = TRAININGS[0]
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def batch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script, run by bash from the checkout, outside a job unless ``environment`` says otherwise."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", str(CLUSTER / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=outside | environment, capture_output=True, text=True)


def dry(script: str, *arguments: str, **environment: str) -> list[str]:
    done = batch(script, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def put_on_path(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
