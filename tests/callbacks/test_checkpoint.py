"""When checkpoints are saved, on a linear module: steps, errors, full disks, signals, validations."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.checkpoint import CheckpointError, SafeCheckpoint
from callbacks.checkpoint_files import fault
from sparsekv_pl.evaluation.stop_signal import Stopped
from tests.callbacks.checkpoint_cases import AtBatch, Line, Ranks, fill_disk, names, send
from tests.tiny_training import MakeTrainer


def test_the_last_ones_are_kept_and_the_last_step_is_among_them(fit: Any, tmp_path: Path) -> None:
    fit(max_steps=7)
    assert names(tmp_path) == {"step=6.ckpt", "step=7.ckpt"}
    saved = torch.load(tmp_path / "step=7.ckpt", weights_only=True)
    assert saved["global_step"] == 7


def test_a_resumed_run_deletes_what_the_one_before_it_saved(fit: Any, tmp_path: Path) -> None:
    fit(max_steps=4, max_epochs=-1)
    fit(max_steps=8, max_epochs=-1, every=4, ckpt_path="last")
    assert names(tmp_path) == {"step=4.ckpt", "step=8.ckpt"}
    trainer, _ = fit(max_steps=16, max_epochs=-1, every=4, ckpt_path="last")
    assert trainer.global_step == 16
    assert names(tmp_path) == {"step=12.ckpt", "step=16.ckpt"}


def test_none_is_saved_in_the_middle_of_accumulation(fit: Any, tmp_path: Path) -> None:
    """Lightning's saves after a resumed run's first micro-batch again: the step is still divisible by the interval."""
    fit(Ranks(), max_steps=2, max_epochs=-1, accumulate_grad_batches=3)
    before = (tmp_path / "step=2.ckpt").stat().st_ino
    resumed = AtBatch(8, lambda: inodes.append((tmp_path / "step=2.ckpt").stat().st_ino))
    inodes: list[int] = []
    fit(Ranks(), resumed, max_steps=4, max_epochs=-1, accumulate_grad_batches=3, ckpt_path="last")
    assert inodes == [before]
    assert torch.load(tmp_path / "step=4.ckpt", weights_only=True)["ready"] == 12


@pytest.mark.parametrize("setting", [{"keep": 1}, {"every": 0}])
def test_settings_that_cannot_be_are_refused(setting: dict[str, int], fit: Any) -> None:
    with pytest.raises(ValueError, match=r"SafeCheckpoint\.(keep=1|every_n_train_steps=0): give"):
        fit(**setting)


def test_an_error_leaves_a_checkpoint(fit: Any, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        fit(AtBatch(3, fail), max_steps=6)
    assert names(tmp_path) == {"step=2.ckpt", "step=3.ckpt"}


def test_an_error_before_the_first_step_leaves_what_was_resumed_from(fit: Any, tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_start(self, *_: Any) -> None:
            raise RuntimeError("first")

    fit(max_steps=2)
    before = (tmp_path / "step=2.ckpt").stat().st_ino
    with pytest.raises(RuntimeError, match="first"):
        fit(Fail(), max_steps=4, max_epochs=-1, ckpt_path="last")
    assert (tmp_path / "step=2.ckpt").stat().st_ino == before


# --- full disks ---


@pytest.mark.usefixtures("room")
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    fit: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(CheckpointError) as stopped:
        fit(AtBatch(3, fill_disk), max_steps=6)
    said = str(stopped.value)
    assert said.startswith(f"checkpoint {tmp_path}/step=4.ckpt was not saved: File too large. ")
    assert re.search(r"need 121,\d{3} bytes; [\d,]+ bytes are free", said)  # float32 weights and two moments
    assert f"Last good checkpoint: {tmp_path}/step=2.ckpt." in said
    assert "\n" not in said
    assert names(tmp_path) == {"step=2.ckpt"}
    assert not fault(tmp_path / "step=2.ckpt")
    assert not [warned for warned in recwarn if "was not saved" in str(warned.message)], "it was tried again"


@pytest.mark.usefixtures("room")
def test_a_full_disk_does_not_hide_what_stopped_the_run(fit: Any, tmp_path: Path) -> None:
    def fail() -> None:
        fill_disk()
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"), pytest.warns(UserWarning, match=r"step=3\.ckpt was not saved"):
        fit(AtBatch(3, fail), max_steps=6)
    assert names(tmp_path) == {"step=2.ckpt"}


@pytest.mark.usefixtures("room")
def test_a_disk_that_an_export_fills_is_no_traceback_either(fit: Any, tmp_path: Path) -> None:
    class Export(Callback):
        def on_save_checkpoint(self, *_: Any) -> None:
            if (tmp_path / "step=2.ckpt").exists():
                raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match=r"step=4\.ckpt was not saved: No space left on device"):
        fit(Export(), max_steps=6)


# --- signals ---


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in watched}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step(number: signal.Signals, fit: Any, tmp_path: Path) -> None:
    """Batch 4 is the second of the three of step 2."""
    with pytest.raises(Stopped) as stopped:
        fit(Ranks(), AtBatch(4, lambda: send(number)), every=9, accumulate_grad_batches=3)
    assert stopped.value.code == 128 + number
    assert names(tmp_path) == {"step=2.ckpt"}
    assert torch.load(tmp_path / "step=2.ckpt", weights_only=True)["ready"] == 6


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(fit: Any, tmp_path: Path) -> None:
    again = AtBatch(4, lambda: [call(signal.SIGINT) for call in (send, send)])
    with pytest.raises(SystemExit) as stopped:
        fit(again, every=9, accumulate_grad_batches=3)
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("room")
def test_a_full_disk_at_sigterm_is_what_the_run_ends_with(fit: Any, tmp_path: Path) -> None:
    def end() -> None:
        fill_disk()
        send(signal.SIGTERM)

    with pytest.raises(CheckpointError, match=r"step=4\.ckpt was not saved: File too large"):
        fit(AtBatch(3, end), max_steps=6)
    assert names(tmp_path) == {"step=2.ckpt"}


def test_a_requeue_waits_for_the_end_of_the_step_and_training_goes_on(fit: Any, tmp_path: Path) -> None:
    """Stands in for the handler that Lightning has under Slurm."""
    seen: list[set[str]] = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(names(tmp_path)))
    trainer, _ = fit(
        AtBatch(4, lambda: send(signal.SIGUSR1)),
        AtBatch(5, lambda: seen.append({"batch 5 started"})),
        AtBatch(6, lambda: seen.append({"batch 6 started"})),
        every=2,
        accumulate_grad_batches=3,
    )
    assert seen == [{"batch 5 started"}, {"step=2.ckpt"}, {"batch 6 started"}]
    assert trainer.global_step == 4


# --- validation ---


class Validated(Callback):
    """Counts validations, and saves the count."""

    def __init__(self, action: Callable[[], Any] = lambda: None) -> None:
        self.count, self.action = 0, action

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self.action()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class ValidatedLine(Line):
    def validation_step(self, batch: Tensor) -> None:
        pass

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.fixture
def validated(tiny_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., tuple[Trainer, Validated]]:
    """Six steps that end in a validation every two, as every two end in a checkpoint."""

    def run(seen: Validated, ckpt_path: Any = None, max_steps: int = 6, every: int = 2) -> Trainer:
        saver = SafeCheckpoint(every, 2, str(tmp_path))
        settings = {"limit_val_batches": 2, "num_sanity_val_steps": 1, "accumulate_grad_batches": 2}
        trainer = tiny_trainer(
            saver, seen, enable_checkpointing=True, max_steps=max_steps, val_check_interval=4, **settings
        )
        trainer.fit(ValidatedLine(), ckpt_path=ckpt_path)
        return trainer

    return run


def test_a_checkpoint_holds_what_the_validation_of_its_step_taught(
    validated: Callable[..., Trainer], tmp_path: Path
) -> None:
    first, resumed = Validated(), Validated()
    validated(first, max_steps=4)
    assert first.count == 3  # with the sanity check
    assert names(tmp_path) == {"step=2.ckpt", "step=4.ckpt"}
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]
    assert saved[Validated.__qualname__] == {"count": 2}
    validated(resumed, ckpt_path=tmp_path / "step=2.ckpt")
    assert resumed.count == 4  # none twice, none left out: those of steps 4 and 6 are new


@pytest.mark.parametrize("every", [2, 100])
def test_sigterm_in_a_validation_waits_for_its_end(
    every: int, validated: Callable[..., Trainer], tmp_path: Path
) -> None:
    seen = Validated()
    seen.action = lambda: send(signal.SIGTERM) if seen.count == 1 else None
    with pytest.raises(Stopped):
        validated(seen, every=every)
    assert seen.count == 2
    assert names(tmp_path) == {"step=2.ckpt"}
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]
    assert saved[Validated.__qualname__] == {"count": 2}
