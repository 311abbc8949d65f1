"""Checkpoints that are whole or absent, on a linear module: full disks, damage, malice, signals, what is kept."""

import os
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.checkpoint import CheckpointError, SafeCheckpoint
from callbacks.checkpoint_files import chosen, fault, newest_readable, written_whole
from sparsekv_pl.modules.stop_signal import Stopped
from tests.tiny_training import MakeTrainer

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
    """Does something when micro-batch ``batch`` (from 0) starts."""

    def __init__(self, batch: int, action: Callable[[], Any]) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, _: Any, batch_idx: int) -> None:  # noqa: ARG002
        if batch_idx == self.batch:
            self.action()


class Ranks(Callback):
    """The checkpoint's own state, to see at which micro-batch it was saved."""

    def on_save_checkpoint(self, trainer: Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ready"] = trainer.fit_loop.epoch_loop.batch_progress.current.ready


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
    """As much room after the test as before it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def send(number: int) -> None:
    os.kill(os.getpid(), number)


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
    """Makes the folder ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# --- what is saved and kept ---


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


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_was_there_stays_until_the_new_one_is_whole(folder: bool, tmp_path: Path) -> None:
    def write(content: str, fail: bool = False) -> None:
        with written_whole(target, None) as partial:
            if folder:
                partial.mkdir()
            (partial / "content" if folder else partial).write_text(content)
            assert not fail
        assert names(tmp_path) == {"it.ckpt"}

    def read() -> str:
        return (target / "content" if folder else target).read_text()

    target = tmp_path / "it.ckpt"
    write("old")
    with pytest.raises(AssertionError):
        write("half", fail=True)
    assert names(tmp_path) == {"it.ckpt"}
    assert read() == "old"
    write("new")
    assert read() == "new"


def test_what_a_killed_process_left_is_deleted(fit: Any, tmp_path: Path) -> None:
    (tmp_path / ".step=9.ckpt.partial").write_text("half")
    fit(max_steps=2)
    assert names(tmp_path) == {"step=2.ckpt"}


# --- which one is read ---


@pytest.mark.parametrize(
    ("damage", "why"),
    [(cut, "truncated or corrupt"), (lambda path: flip(path, 0.5), "checksum of .* does not match")],
    ids=["truncated", "flipped"],
)
def test_the_one_before_a_damaged_one_is_used(
    damage: Callable[[Path], None], why: str, fit: Any, tmp_path: Path
) -> None:
    _, straight = fit(max_steps=6, max_epochs=-1)
    damage(tmp_path / "step=6.ckpt")
    with pytest.warns(UserWarning, match=f"checkpoint not used: {tmp_path}/step=6.ckpt: .*{why}"):
        trainer, module = fit(max_steps=6, max_epochs=-1, ckpt_path="last")
    assert trainer.ckpt_path == str(tmp_path / "step=4.ckpt")
    assert not fault(tmp_path / "step=6.ckpt"), "it is written anew"
    assert trainer.global_step == 6
    assert straight.map.weight.shape == module.map.weight.shape


def test_no_readable_one_is_an_error_and_none_at_all_is_a_start(fit: Any, tmp_path: Path) -> None:
    trainer, _ = fit(max_steps=4, ckpt_path="last")
    assert trainer.global_step == 4
    for path in tmp_path.glob("*.ckpt"):
        cut(path)
    with pytest.raises(ValueError, match=r"no checkpoint can be read; start anew .*step=4.*; .*step=2"):
        fit(max_steps=4, ckpt_path="last")


def test_ckpt_path_may_be_a_file_a_folder_or_a_run(fit: Any, tmp_path: Path) -> None:
    fit(max_steps=4)
    newest = tmp_path / "step=4.ckpt"
    run = tmp_path / "run"
    shutil.copytree(tmp_path, run / "checkpoints")
    assert chosen(newest) == chosen(tmp_path) == newest
    assert chosen(run).name == "step=4.ckpt"
    cut(newest)
    with pytest.raises(ValueError, match=r"step=4\.ckpt: it is truncated or corrupt"):
        chosen(newest)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.ckpt in this folder"):
        chosen(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such file or folder"):
        chosen(tmp_path / "absent")


def test_code_in_a_checkpoint_is_not_run(fit: Any, tmp_path: Path) -> None:
    fit(max_steps=2)
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    torch.save(content | {"more": Malice(tmp_path / "ran")}, tmp_path / "step=9.ckpt")
    assert "whose code loading would run" in fault(tmp_path / "step=9.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        fit(ckpt_path=tmp_path / "step=9.ckpt")
    with pytest.warns(UserWarning, match=r"step=9\.ckpt: it holds objects"):
        fit(max_steps=3, max_epochs=-1, ckpt_path="last")
    assert not (tmp_path / "ran").exists()


def test_loading_with_code_cannot_be_asked_for(tiny_trainer: MakeTrainer, fit: Any, tmp_path: Path) -> None:
    fit(max_steps=2)
    trainer = tiny_trainer(SafeCheckpoint(2, dirpath=str(tmp_path)), enable_checkpointing=True)
    with pytest.raises(ValueError, match="weights_only=false would run code"):
        trainer.fit(Line(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=False)


# --- sharded ones ---


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """As Lightning's ModelParallelStrategy saves: torch's shards and metadata, and the rest in meta.pt."""
    folder = tmp_path / "step=2.ckpt"
    module = Line()
    optimizer = module.configure_optimizers()
    module.training_step(torch.ones(1, 100), 0).backward()
    optimizer.step()
    state = {"state_dict": module.state_dict(), "optimizer_0": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 2}, folder / "meta.pt")
    return folder


def test_a_sharded_one_is_read(sharded: Path) -> None:
    assert fault(sharded) == ""
    assert chosen(sharded.parent) == chosen(sharded) == sharded


def test_a_damaged_sharded_one_is_not(sharded: Path) -> None:
    shard = next(sharded.glob("*.distcp"))
    cut(shard)
    assert f"{shard.name} ends early" in fault(sharded)
    shard.unlink()
    assert "No such file" in fault(sharded)
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        newest_readable([sharded])


def test_code_in_a_sharded_one_is_not_run(sharded: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.planner_data = Malice(tmp_path / "ran")
    good = (sharded / ".metadata").read_bytes()
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "posix.mkdir" in fault(sharded)
    (sharded / ".metadata").write_bytes(good)
    assert not fault(sharded)
    shutil.rmtree(sharded)
    dcp.save({"state_dict": {"more": Malice(tmp_path / "ran")}}, checkpoint_id=sharded, no_dist=True)
    torch.save({}, sharded / "meta.pt")
    assert "whose code loading would run" in fault(sharded)
    assert not (tmp_path / "ran").exists()


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
