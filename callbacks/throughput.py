"""Log the speed and the peak memory of training."""

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
    """Seconds, tokens and steps since training started, at the end of an optimizer step."""

    seconds: float
    tokens: int
    steps: int


class Throughput(pl.Callback):
    """Measure the speed of training over a sliding window of optimizer steps.

    Time includes waiting for data and writing checkpoints, but not validation. Lightning's ThroughputMonitor is not
    used because it bypasses ``callback_metrics`` and the progress bar, logs nothing until its window is full, and
    counts batches. Raises ``ValueError`` for a setting below 1.

    Parameters
    ----------
    every_n_steps
        Optimizer steps from one measurement to the next. Default: the trainer's ``log_every_n_steps``, at which
        loggers write.
    window
        Number of optimizer steps that speeds are averaged over (fewer at the start of a run).

    Logs
    ----
    throughput/tokens_per_second
        Context and continuation tokens of all ranks per second, without contexts' padding, which is not computed.
    throughput/steps_per_second
        Optimizer steps per second.
    throughput/peak_memory_gib
        Peak memory in GiB, the largest of all ranks: on a GPU of tensors since training started, on a CPU of the
        process since its start.
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
        """Start counting after the sanity check."""
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
        """Count the batch, and log after every ``every_n_steps`` optimizer steps."""
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
    """Return the peak memory so far in GiB: of tensors on a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
