"""Checkpoints from which a run resumes exactly, however it was stopped."""

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint import CheckpointException
from typing_extensions import override

from callbacks.checkpoint_files import (
    CheckpointError,
    WholeCheckpointIO,
    bytes_of,
    checkpoints_in,
    newest_readable,
    not_saved,
    saved_whole,
)
from sparsekv_pl.evaluation.second_signal import STOPS
from sparsekv_pl.evaluation.stop_signal import HeldSignals, Stopped
from sparsekv_pl.storage.whole_files import check_room, disk_error, mend

REQUEUES = (signal.SIGUSR1, signal.SIGUSR2)


class SafeCheckpoint(ModelCheckpoint):
    """Save complete checkpoints between optimizer steps and when a signal ends the run; keep the last ones.

    A checkpoint is written under a hidden name, flushed to disk and renamed; if that fails, the run stops with
    ``CheckpointError`` on every rank. ``--ckpt_path last`` is the readable checkpoint of the latest step. The last step
    is always saved.

    A step's validation runs before its checkpoint, which therefore includes the state of an adaptive curriculum.

    SIGTERM and Ctrl-C wait for the end of the optimizer step and of its validation; all ranks then save together and
    exit with 143 or 130. Lightning's signal for requeueing a Slurm job waits too: inside a step its collectives would
    interfere with those of training. A second signal ends the run at once. After another error, a single process saves
    its state at the beginning of the current optimizer step; several ranks cannot coordinate then, and the last
    checkpoint remains. Raises ``ValueError`` for a setting out of range, or a ``dirpath`` that is an address.

    Parameters
    ----------
    every_n_train_steps
        Optimizer steps from one checkpoint to the next.
    keep
        Number of checkpoints to keep, at least 2, so that there is one before the newest. While a checkpoint is
        written, the disk holds ``keep`` + 1.
    dirpath
        A local folder; by default ``checkpoints`` in the logger's folder.
    """

    def __init__(self, every_n_train_steps: int, keep: int = 2, dirpath: str | None = None) -> None:
        if keep < 2:
            raise ValueError(f"SafeCheckpoint.keep={keep}: give 2 or more, so that there is one before the newest")
        if every_n_train_steps < 1:
            raise ValueError(f"SafeCheckpoint.every_n_train_steps={every_n_train_steps}: give 1 or more")
        super().__init__(
            dirpath,
            filename="{step}",
            monitor="step",  # makes Lightning keep the last ones
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
            save_on_exception=True,
            enable_version_counter=False,
        )
        self._signals = HeldSignals()
        self._training = False

    @property
    @override
    def state_key(self) -> str:
        """The same key for every interval, so that a run resumed with another interval still deletes old files."""
        return type(self).__qualname__

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if "://" in str(self.dirpath):
            raise ValueError(f"SafeCheckpoint.dirpath={self.dirpath}: give a local folder")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if trainer.is_global_zero and stage == "fit":
            mend(Path(str(self.dirpath)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # the step resumed from is on disk
        if trainer.is_global_zero:
            check_room(Path(str(self.dirpath)), bytes_of(pl_module, trained=True), "a checkpoint takes")
        self._training, self._signals = True, HeldSignals()
        requeues = (number for number in REQUEUES if callable(signal.getsignal(number)))
        self._signals.hold(*STOPS, *requeues, doing="finishing the step and saving")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        # A resumed run does not validate at the step that it was saved at.
        if not loop._should_accumulate() and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._end_step(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            self._end_step(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_now(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (CheckpointError, SystemExit)) or self._signals.asked:
            return  # the disk is full, or everything is saved, or the user sent a second signal
        if trainer.world_size > 1 or not self._training or not self._should_save_on_exception(trainer):
            return
        try:
            self._save_now(trainer)
        except Exception as error:
            rank_zero_warn(str(error))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._training = False
        self._signals.release()

    def _end_step(self, trainer: Trainer) -> None:
        if trainer.global_step % self._every_n_train_steps == 0:
            self._save_now(trainer)
        self._obey(trainer)

    def _obey(self, trainer: Trainer) -> None:
        """Act on a signal that any rank got. Collective: every rank calls it after every optimizer step."""
        asked = torch.tensor(self._signals.asked, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if number in REQUEUES:
            self._signals.asked = 0
            self._signals.before[number](number, None)
        elif number:
            self._save_now(trainer)
            self._stop(trainer, number)

    def _stop(self, trainer: Trainer, number: int) -> None:
        # Lightning kills this process if another one that it started exits first: forget those processes.
        getattr(trainer.strategy.launcher, "procs", []).clear()
        name = signal.Signals(number).name
        rank_zero_info(f"{name}: stopped after step {trainer.global_step}; resume with --ckpt_path last")
        raise Stopped(number)

    def _save_now(self, trainer: Trainer) -> None:
        """Save a checkpoint, unless this step is saved already."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save as Lightning does, but stop all ranks if one fails, so that none waits for it."""
        failure: BaseException | None = None
        try:
            self._write(trainer, Path(filepath))
        except (Exception, CheckpointException) as error:
            refused = None if isinstance(error, CheckpointError) else disk_error(error)  # possibly of an export
            failure = CheckpointError(not_saved(Path(filepath), 0, refused)) if refused else error
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            raise failure or CheckpointError(f"checkpoint {filepath} was not saved: see another rank's error")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _write(self, trainer: Trainer, path: Path) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        sharded = getattr(
            trainer.strategy, "_save_distributed_checkpoint", False
        )  # writes a folder without the CheckpointIO
        whole = sharded and trainer.is_global_zero
        with saved_whole(path, checkpoint) if whole else nullcontext(path) as target:
            trainer.strategy.save_checkpoint(checkpoint, target)

    @override
    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Also remove the checkpoint resumed from, once newer ones are complete; else each resumption leaves one."""
        return previous != current and Path(str(self.dirpath)).absolute() in Path(previous).absolute().parents

    @override
    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Find ``--ckpt_path last``: the latest readable one of these and of those saved for a Slurm requeue."""
        folder = Path(str(self._ModelCheckpoint__resolve_ckpt_dir(trainer)))  # type: ignore[attr-defined]
        found = [*checkpoints_in(folder), *Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")]
        return {str(newest_readable(found))} if found else set()
