"""A linear module, and faults of its checkpoints: full disks, damage, malicious files, signals."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOM = 20_000
"""Bytes that a test's file may have; a checkpoint of ``Line`` has more."""


class Line(LightningModule):
    """A linear map of 100 x 100; batch i is all i."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(100, 100)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.map(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(24.0)[:, None].expand(24, 100), batch_size=1)  # type: ignore[arg-type]


class AtBatch(Callback):
    """Run a function when micro-batch ``batch`` (from 0) starts."""

    def __init__(self, batch: int, action: Callable[[], Any]) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, _: Any, batch_idx: int) -> None:  # noqa: ARG002
        if batch_idx == self.batch:
            self.action()


class Ranks(Callback):
    """The checkpoint's own state, to see at which micro-batch it was saved."""

    def on_save_checkpoint(self, trainer: Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ready"] = trainer.fit_loop.epoch_loop.batch_progress.current.ready


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def send(number: int) -> None:
    """Call the handler of signal ``number``: a real SIGTERM would end the test run (tests/termination.py)."""
    handler = signal.getsignal(number)
    assert callable(handler), f"no handler of {number}"
    handler(number, None)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def flip(path: Path, at: float) -> None:
    """Turn one byte, ``at`` of the way into the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class Malice:
    """An object that makes the folder ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# --- what is saved and kept ---
