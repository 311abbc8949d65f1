"""Training runs with equal weights and global batches, on several ranks or in one process."""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import measure  # noqa: F401  puts the checkout on the path
import torch
from kvpress import SnapKVPress
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.utils.logging import disable_progress_bar

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import IGNORE, Batch
from sparsekv_pl.objectives import EIT, Objective
from sparsekv_pl.training.eit_module import EITModule
from sparsekv_pl.training.sharding import gathered

ROWS, STEPS, CONTEXT, CONTINUATION = 4, 4, 96, 16
"""Rows of a global batch; number of batches; tokens of a row."""
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 2e-2, "bf16-true": 5e-2}
TIMEOUT = timedelta(minutes=2)


class Rows(LightningDataModule):
    """Random global batches that are the same in every run; each rank takes its part of the rows."""

    def __init__(self, rows: int, context: int, continuation: int, batches: int, vocabulary: int = 1_000) -> None:
        super().__init__()
        shape = batches, rows, context + continuation
        self.ids = torch.randint(8, vocabulary, shape, generator=torch.Generator().manual_seed(0))
        self.context = context

    def train_dataloader(self) -> Any:
        """One batch per step."""
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return _loader([ids.chunk(ranks)[rank] for ids in self.ids], self.context)

    def val_dataloader(self) -> Any:
        """Two of the batches, distributed over the ranks."""
        return _loader(list(self.ids[:2]), self.context)


def _loader(batches: Sequence[Tensor], context: int) -> Any:
    """A stateful loader: a plain one would start from the first batch on resume."""
    return StatefulDataLoader([_batch(ids, context) for ids in batches], batch_size=None)  # type: ignore[arg-type]


def _batch(ids: Tensor, context: int) -> Batch:
    labels = ids[:, context:].clone()
    labels[:, 0] = IGNORE
    rows = len(ids)
    return {
        "context_ids": ids[:, :context],
        "continuation_ids": ids[:, context:],
        "labels": labels,
        "document_ids": ["random"] * rows,
        "tasks": ["text"] * rows,
    }


class Losses(Callback):
    """Records every batch's loss, averaged over ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


SGD = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
"""Plain SGD: unlike Adam's, its steps depend on the size of the gradients."""
SLOW = partial(torch.optim.SGD, lr=0.1)


@dataclass
class Case:
    """A training run whose losses and weights must be equal on several ranks and in one process."""

    eviction: Callable[[], Eviction] = lambda: RealEviction(SnapKVPress(window_size=8))
    objective: Callable[[], Objective] = EIT
    model: str = "tied"
    adapter: bool = True
    optimizer: Any = SGD
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A run's folder, models, number of ranks and device."""

    folder: Path
    models: dict[str, str]
    ranks: int
    accelerator: str
    consolidated: bool = False
    sharded: bool = True

    def strategy(self) -> Any:
        """The strategy: FSDP2 or DDP over all ranks, or a single process."""
        if self.ranks == 1:
            return "auto"
        backend = "gloo" if self.accelerator == "cpu" else None
        if not self.sharded:
            return DDPStrategy(process_group_backend=backend, timeout=TIMEOUT)
        sizes = {"data_parallel_size": self.ranks, "tensor_parallel_size": 1}
        return ModelParallelStrategy(
            **sizes, save_distributed_checkpoint=not self.consolidated, process_group_backend=backend, timeout=TIMEOUT
        )

    def module(self, case: Case, **backbone: Any) -> EITModule:
        """The module that ``case`` trains, with the same initial weights in every run."""
        torch.manual_seed(0)
        start = {"adapter": str(self.folder / "adapter"), "lora": None} if case.adapter else {"lora": None}
        settings = {"dtype": "float32", "sharded": self.ranks > 1, **start, **backbone}
        module = EITModule(
            Backbone(self.models[case.model], **settings), case.eviction(), case.objective(), case.optimizer
        )
        module.compression_ratio = 0.5
        return module

    def trainer(self, case: Case, *callbacks: Callback, **settings: Any) -> Trainer:
        """A trainer for ``case``; ``settings`` override its own."""
        return Trainer(callbacks=list(callbacks), **self.settings() | {"max_steps": STEPS} | case.trainer | settings)

    def settings(self) -> dict[str, Any]:
        """Trainer settings for these ranks: silent, without automatic checkpoints."""
        quiet = ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing")
        return dict.fromkeys(quiet, False) | {
            "accelerator": self.accelerator,
            "devices": self.ranks,
            "strategy": self.strategy(),
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "use_distributed_sampler": False,
            "default_root_dir": self.folder,
        }

    def fit(self, case: Case, *callbacks: Callback, resume: Path | None = None, **settings: Any) -> dict[str, Any]:
        """Train; return {"losses": one per batch, "weights": the gathered trainable weights, on rank 0}. Collective."""
        module, losses = self.module(case), Losses()
        rows = Rows(ROWS, CONTEXT, CONTINUATION, 2 * STEPS)
        self.trainer(case, losses, *callbacks, **settings).fit(module, rows, ckpt_path=resume)
        weights = gathered(module)
        if weights is None:
            weights = {n: p.detach().cpu() for n, p in module.model.named_parameters() if p.requires_grad}
        return {"losses": losses.losses, "weights": weights}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def become(rank: int, port: int) -> None:
    """Set the environment variables by which Lightning recognises this process as a rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    quiet()


def quiet() -> None:
    """Silence progress bars and the trainer's messages about itself."""
    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
