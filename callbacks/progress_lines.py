"""Progress without a terminal: lines in a log instead of a bar."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from typing_extensions import override

from callbacks.progress import StepsBar
from sparsekv_pl.evaluation.pace import LINE_SECONDS, BatchShare, Pace
from sparsekv_pl.models.batch import tokens_read
from sparsekv_pl.models.duration import duration
from sparsekv_pl.reporting.logged_terms import KEPT, MOST


def progress() -> ProgressBar:
    """Return a progress bar in a terminal, progress lines elsewhere (nohup, Slurm, Docker, CI)."""
    return StepsBar() if sys.stdout.isatty() else ProgressLines()


class ProgressLines(ProgressBar):
    """Print a line at every logging interval of a training and after validations; in evaluations every half minute.

    A training's line has the step, the module's ``train/`` metrics, tokens per second of all ranks since the previous
    line, and the estimated time left, including validation. Work inside one batch of an evaluation that takes longer
    than half a minute is reported by the module (``piece_done``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock: Callable[[], float] = time.monotonic
        self._shows = True
        self._pace: Pace | None = None
        self._share = BatchShare(0.0)
        self._batches = 0
        self._tokens = self._first_step = self._step = 0
        self._started = self._marked = self._validation = 0.0

    @override
    def disable(self) -> None:
        self._shows = False

    @override
    def enable(self) -> None:
        self._shows = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._step = trainer.global_step
        self._started = self._marked = self.clock()
        self._tokens = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += trainer.world_size * _tokens(batch)
        step, every = trainer.global_step, max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if not self._shows or step == self._step or (step % every and step != trainer.max_steps):
            return
        now, self._step = self.clock(), step
        speed = self._tokens / max(now - self._marked, 1e-9)
        parts = [*_shown(trainer.callback_metrics, "train/"), f"{speed:,.0f} tokens/s"]
        if trainer.max_steps > 0:
            rest = (now - self._started) / (step - self._first_step) * (trainer.max_steps - step)
            parts.append(f"{duration(rest)} left")
        of = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        self.print(f"step {step}{of}: {', '.join(parts)}")
        self._marked, self._tokens = self.clock(), 0

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation = self.clock()
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin("validation", sum(batches))

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._batches += 1
        if self._shows and self._pace is not None and self.clock() - self._validation > LINE_SECONDS:
            self._pace.reached(self._batches)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        took = self.clock() - self._validation
        self._marked += took
        self._pace = None
        after = f"after step {trainer.global_step}" if trainer.global_step else "before the first step"
        parts = [*_shown(trainer.callback_metrics, "val/"), f"took {duration(took)}"]
        self.print(f"validation {after}: {', '.join(parts)}")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("evaluation", sum(trainer.num_test_batches))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("analysis", sum(trainer.num_predict_batches))

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batches += 1
        self._tokens += _tokens(batch)
        if self._shows and self._pace is not None:
            speed = self._tokens / max(self.clock() - self._marked, 1e-9)
            self._pace.reached(self._batches, *([f"{speed:,.0f} tokens of cases/s"] if self._tokens else []))
            self._share = BatchShare(self.clock())

    on_predict_batch_end = on_test_batch_end

    def on_piece_end(self, done: int, pieces: int) -> None:
        """Report that ``done`` of ``pieces`` pieces of the current batch are done."""
        if self._shows and self._pace is not None and done < pieces:
            share = self._share.after(done, pieces, self.clock())
            self._pace.reached(self._batches + share, f"{done} of {pieces} measurements of the next")

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._shows:
            print(*args, flush=True, **kwargs)

    def _begin(self, what: str, batches: float) -> None:
        self._pace, self._batches, self._tokens = Pace(what, "batches", batches), 0, 0
        self._marked = self.clock()
        self._share = BatchShare(self._marked)


def _tokens(batch: Any) -> int:
    if not isinstance(batch, Mapping) or "context_ids" not in batch:
        return 0
    return tokens_read(batch) if "labels" in batch else batch["context_ids"].numel()  # type: ignore[arg-type]


def _shown(metrics: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Format the metrics with ``prefix`` as name and value, without those of single layers.

    The most that could be kept of a press's attention follows what it keeps: "kept_mass/KeyDiff 0.61 of 0.93".
    """
    own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    most = {name: own.pop(name) for name in [*own] if name.startswith(f"{MOST}/")}
    limits = {name.replace(MOST, KEPT, 1): f" of {value:.4g}" for name, value in most.items()}
    return [f"{name} {value:.4g}{limits.get(name, '')}" for name, value in own.items() if not name[-1].isdigit()]
