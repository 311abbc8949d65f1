"""The environment of a run: hardware, versions, seed, device and precision."""

import os
import platform
import time
from importlib import metadata
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

REPORTED_PACKAGES = ("torch", "lightning", "transformers", "peft", "kvpress", "torchmetrics", "datasets")


def environment() -> dict[str, object]:
    """Python, processors, devices and package versions; no personal data."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "packages": {name: metadata.version(name) for name in REPORTED_PACKAGES},
    }


def run_environment(module: LightningModule, started: float, **more: object) -> dict[str, object]:
    """``environment`` with the run's seed, device, precision, duration since ``started``, and ``more``."""
    return {
        **environment(),
        "seed": torch.initial_seed() % 2**32,
        "device": str(module.device),
        "precision": str(module.trainer.precision),
        "wall_seconds": round(time.time() - started, 1),
        **more,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
