"""Stop evaluations and analyses at a signal, between two pieces of work, keeping all finished work."""

import signal
from functools import partial
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.checkpoint import SafeCheckpoint
from sparsekv_pl.evaluation.second_signal import STOPS
from sparsekv_pl.evaluation.stop_signal import HeldSignals, Stopped


class Stopping(Callback):
    """Finish the current measurement after the first SIGTERM or Ctrl-C, then exit with 143 or 130.

    The signal is passed on to ranks that Lightning started. Trainings are stopped by ``SafeCheckpoint``; without it
    they stop as Lightning does, and a message says so.
    """

    def __init__(self) -> None:
        self._signals = HeldSignals()
        self._trainer: Trainer | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(isinstance(callback, SafeCheckpoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            lightning = signal.getsignal(signal.SIGTERM)
            also = lightning if callable(lightning) else None
            self._signals.hold(signal.SIGTERM, doing="finishing the step", also=also)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold(trainer)

    on_predict_start = on_test_start

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._hold(trainer)

    @override
    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._obey()

    on_predict_batch_end = on_validation_batch_end = on_test_batch_end

    def on_piece_end(self, done: int, pieces: int) -> None:  # noqa: ARG002
        """Stop here if a signal arrived: this piece of the batch is measured and stored."""
        self._obey()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _hold(self, trainer: Trainer) -> None:
        self._trainer, self._signals = trainer, HeldSignals()
        doing = "finishing what is being measured; all that is finished is kept"
        self._signals.hold(*STOPS, doing=doing, also=partial(_pass_on, trainer))

    def _release(self) -> None:
        self._signals.release()
        self._trainer = None

    def _obey(self) -> None:
        if self._trainer is None or not self._signals.is_set():
            return
        number = self._signals.asked
        _started(self._trainer).clear()  # Lightning kills this process if another one that it started exits first
        rank_zero_info(f"{signal.Signals(number).name}: stopped; the same command goes on from here")
        raise Stopped(number)


def _started(trainer: Trainer) -> list[Any]:
    """Return the processes of other ranks that Lightning started from this one."""
    return getattr(trainer.strategy.launcher, "procs", [])


def _pass_on(trainer: Trainer, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    for process in _started(trainer):
        process.send_signal(signal.SIGTERM)
