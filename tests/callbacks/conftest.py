"""Training runs of a linear module that save checkpoints, on a disk that a test may fill."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoint import SafeCheckpoint
from tests.callbacks.checkpoint_cases import Line
from tests.tiny_training import MakeTrainer


@pytest.fixture
def fit(tiny_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., tuple[Trainer, LightningModule]]:
    def run(*more: Callback, every: int = 2, keep: int = 2, ckpt_path: Any = None, **settings: Any) -> Any:
        saver, module = SafeCheckpoint(every, keep, str(tmp_path)), Line()
        trainer = tiny_trainer(saver, *more, enable_checkpointing=True, **settings)
        trainer.fit(module, ckpt_path=ckpt_path)
        return trainer, module

    return run


@pytest.fixture
def room() -> Iterator[None]:
    """Restore the disk's room after the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
