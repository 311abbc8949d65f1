"""Logs the speed and the peak memory of training."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from typing_extensions import override

from sparsekv_pl.models.batch import Batch, tokens_read


class Mark(NamedTuple):
    """What had been done when an optimizer step ended, since training started."""

    seconds: float
    tokens: int
    steps: int


class Throughput(pl.Callback):
    """Measures training over a sliding window of optimizer steps.

    Validation is not counted as time; waiting for data and writing checkpoints are. Lightning's
    ThroughputMonitor does not fit: it logs past ``callback_metrics`` and the progress bar, is silent until
    its window is full, and counts batches.

    Parameters
    ----------
    every_n_steps
        Measure after every so many optimizer steps. Default: the trainer's ``log_every_n_steps``, which is
        also when loggers write.
    window
        How many optimizer steps the speeds are averaged over (fewer at the start of a run).

    Logs
    ----
    throughput/tokens_per_second
        Context and continuation tokens of all ranks: contexts without their padding, which is not computed.
    throughput/steps_per_second
        Optimizer steps.
    throughput/peak_memory_gib
        On a GPU the most memory that tensors held since training started, on a CPU the most that the process
        ever held, in GiB, of the rank that held most.
    """

    def __init__(self, every_n_steps: int | None = None, window: int = 20) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"Throughput.{name} is {value}: give 1 step or more")
        self.every_n_steps = every_n_steps
        self.clock: Callable[[], float] = time.perf_counter
        self._marks: deque[Mark] = deque(maxlen=window + 1)
        self._tokens = 0
        self._paused = 0.0
        self._validation_start = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting, so that the sanity check before it is not counted."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._tokens, self._paused = 0, 0.0
        self._marks.clear()
        self._marks.append(Mark(self.clock(), 0, trainer.global_step))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch; if it ended an optimizer step whose turn it is, log."""
        self._tokens += tokens_read(batch)
        if trainer.global_step == self._marks[-1].steps:  # gradients are still being accumulated
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the step was only queued so far
        self._marks.append(Mark(self.clock() - self._paused, self._tokens, trainer.global_step))
        every_n_steps = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % max(every_n_steps, 1) == 0:
            self._log(pl_module, device)

    def _log(self, pl_module: pl.LightningModule, device: torch.device) -> None:
        first, last = self._marks[0], self._marks[-1]
        seconds = last.seconds - first.seconds
        measured = (
            ("tokens_per_second", (last.tokens - first.tokens) / seconds, "sum"),
            ("steps_per_second", (last.steps - first.steps) / seconds, "mean"),
            ("peak_memory_gib", peak_memory_gib(device), "max"),
        )
        for name, value, over_ranks in measured:
            pl_module.log(f"throughput/{name}", value, on_step=True, sync_dist=True, reduce_fx=over_ranks)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_start = self.clock()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused += self.clock() - self._validation_start


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: by tensors on a CUDA device, by the whole process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
