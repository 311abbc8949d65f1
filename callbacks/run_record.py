"""The record of the run that made an export: data, ratios, command, seed and versions, fit for publication."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks.curriculum import Curriculum
from sparsekv_pl.reporting.environment import REPORTED_PACKAGES
from sparsekv_pl.reporting.public_settings import public_command, public_settings

CHECKOUT = Path(__file__).parents[1]
"""The folder of train.py, in a checkout."""
RESUMED = re.compile(r" --ckpt_path[ =](last|hpc)\b")
"""Options of a command that goes on with its own run."""


def run_record(trainer: pl.Trainer) -> dict[str, Any]:
    """Describe the run of ``trainer`` for an export's training.json, without folders and secrets."""
    curricula = [callback for callback in trainer.callbacks if isinstance(callback, Curriculum)]  # type: ignore[attr-defined]
    seed = os.environ.get("PL_GLOBAL_SEED")  # set by seed_everything
    return {
        "command": RESUMED.sub("", public_command("train.py") or "") or None,
        "seed": int(seed) if seed is not None else None,
        "ranks": trainer.world_size,
        "schedule": curricula[0].schedule.describe() if curricula else None,
        "data": public_settings(getattr(trainer, "datamodule", None)),
        "batches_per_step": trainer.accumulate_grad_batches,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in REPORTED_PACKAGES},
    }


def commit(checkout: Path) -> str | None:
    """Return the commit of ``checkout``, with a + if tracked files differ from it; None where git knows none."""
    if not (checkout / ".git").exists():
        return None
    described = ["git", "-C", str(checkout), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(described, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
