"""Real processes that receive a signal or are requeued by Slurm: what they save, exit codes, and resuming."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor

from tests.cluster_cases import QWEN, ROOT, SLURM, dry, put_on_path
from tests.processes import Started
from tests.test_kill import PIECES, command, finished
from train import TrainCommandLine

STEPS = 24
PATIENCE = 300
"""Seconds for what takes ten on a machine that does nothing else."""


def training(folder: Path, pretrained: str, *more: str) -> list[str]:
    """Two micro-batches a step, one of sentences and questions, no validation."""
    arguments = ["fit", "--config", "configs/quickstart.yaml", f"--model.backbone.pretrained={pretrained}"]
    arguments += ["--model.backbone.dtype=float32", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    arguments += ["--data.context_tokens=96", "--data.continuation_tokens=16", "--data.batch_size=2"]
    arguments += [f"--trainer.max_steps={STEPS}", "--trainer.accumulate_grad_batches=2"]
    arguments += ["--trainer.limit_val_batches=0", "--trainer.callbacks.every_n_train_steps=4"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    arguments += [f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}"]
    return ["train.py", *arguments, *more]


def stop(process: Started, number: int, ready: Callable[[], bool]) -> int:
    """The exit code of a process that gets signal ``number`` once it is ``ready``."""
    try:
        wait_for(ready, process)
        assert process.poll() is None, f"over before it could be stopped: {process.printed[-2000:]}"
        process.send_signal(number)
        return process.wait(PATIENCE)
    finally:
        process.kill()


def wait_for(ready: Callable[[], bool], process: Started) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, process.printed[-2000:]
        time.sleep(0.005)


def saved_one(folder: Path) -> bool:
    return any(folder.glob("checkpoints/*.ckpt"))


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_training_stopped_by_sigterm_goes_on_exactly(tiny_models: dict[str, str], tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    beside = Started(training(straight, tiny_models["llama"]), straight / "log")
    process = Started(training(stopped, tiny_models["llama"]), stopped / "log")
    code = stop(process, signal.SIGTERM, lambda: saved_one(stopped))
    said = (stopped / "log").read_text()
    assert code == 128 + signal.SIGTERM, said[-2000:]
    assert "SIGTERM: stopped after step" in said
    assert "Traceback" not in said
    saved = torch.load(checkpoints(stopped)[-1], weights_only=True)
    assert 4 <= saved["global_step"] < STEPS
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 2 * saved["global_step"]
    on = Started(training(stopped, tiny_models["llama"], "--ckpt_path=last"), stopped / "log")
    assert on.wait(PATIENCE) == beside.wait(PATIENCE) == 0, (stopped / "log").read_text()[-2000:]
    ends = [
        torch.load(folder / "checkpoints" / f"step={STEPS}.ckpt", weights_only=True) for folder in (straight, stopped)
    ]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    assert ends[0]["global_step"] == ends[1]["global_step"] == STEPS


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_two_ranks_stop_together(number: signal.Signals, tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Only the first rank receives the signal; it started the other."""
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    process = Started(training(tmp_path, tiny_models["llama"], *ranks), tmp_path / "log")
    code = stop(process, number, lambda: saved_one(tmp_path))
    said = (tmp_path / "log").read_text()
    assert code == 128 + number, said[-2000:]
    assert "Traceback" not in said
    step = int(re.findall(r"stopped after step (\d+)", said)[0])
    assert step < STEPS
    assert checkpoints(tmp_path)[-1].name == f"step={step}.ckpt"
    assert torch.load(checkpoints(tmp_path)[-1], weights_only=True)["global_step"] == step
    deadline = time.monotonic() + PATIENCE
    while alive := [path for path in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in _arguments(path)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)


def _arguments(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_evaluation_stopped_by_sigterm_keeps_what_is_finished(tiny_models: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Started(command(tmp_path / "output", tiny_models["llama"]), log)
    code = stop(process, signal.SIGTERM, lambda: finished(tmp_path / "output") >= 3)
    assert code == 128 + signal.SIGTERM, log.read_text()[-2000:]
    assert "Traceback" not in log.read_text()
    assert 3 <= finished(tmp_path / "output") <= PIECES
    assert not (tmp_path / "output" / "report.json").exists()


class Long(Callback):
    """A step, or the measuring of a batch, that takes for ever."""

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        print("begun", flush=True)
        time.sleep(600)

    on_test_batch_start = on_predict_batch_start = on_train_batch_start  # type: ignore[assignment]


LONG = "--trainer.callbacks+=tests.test_signals.Long"


@pytest.mark.parametrize(
    ("doing", "number"), [("step", signal.SIGTERM), ("measured", signal.SIGINT), ("analysed", signal.SIGTERM)]
)
def test_the_first_says_what_it_waits_for_and_a_second_stops_at_once(
    doing: str, number: signal.Signals, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    anchors = ["predict", "--config", "configs/analyze/anchors.yaml", "--data.lengths=[96]", f"--report={tmp_path}"]
    anchors += [f"--model.backbone.pretrained={tiny_models['llama']}", "--trainer.accelerator=cpu"]
    line = {
        "step": training(tmp_path, tiny_models["llama"], "--data.num_workers=2", LONG),
        "measured": [*command(tmp_path, tiny_models["llama"]), LONG],
        "analysed": ["evaluate.py", *anchors, LONG],
    }[doing]
    log = tmp_path / "log"
    process = Started(line, log)
    try:
        wait_for(lambda: "begun" in log.read_text(), process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= (2 if doing == "step" else 0)
        process.send_signal(number)
        wait_for(lambda: "a second one stops at once" in log.read_text(), process)
        time.sleep(1)
        assert process.poll() is None, log.read_text()[-2000:]
        process.send_signal(number)
        assert process.wait(10) == 128 + number
    finally:
        process.kill()
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    said = log.read_text()
    assert said.count(f"{number.name}: finishing ") == 1 and f"{number.name}: stopped at once" in said
    assert "Traceback" not in said


def test_an_analysis_stops_between_two_batches(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Lightning's own prediction loop does not look for a signal."""
    arguments = ["predict", "--config", "configs/analyze/anchors.yaml", "--data.lengths=[96]", "--data.windows=400"]
    arguments += [f"--model.backbone.pretrained={tiny_models['llama']}", f"--report={tmp_path}"]
    log = tmp_path / "log"
    process = Started(["evaluate.py", *arguments, "--trainer.accelerator=cpu"], log)
    code = stop(process, signal.SIGTERM, lambda: finished(tmp_path) >= 3)
    assert code == 128 + signal.SIGTERM, log.read_text()[-2000:]
    assert "SIGTERM: stopped; the same command goes on from here" in log.read_text()
    assert not (tmp_path / "report.json").exists()


class Signal(Callback):
    """The signal that Slurm sends before the time limit, in the middle of the second step's accumulation."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if batch_idx == 3 and trainer.ckpt_path is None:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_requeued_training_ends_as_one_that_was_never_stopped(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    put_on_path(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log', monkeypatch)
    run = tmp_path / "run"
    more = ["--config", str(ROOT / "configs" / "train" / "small.yaml"), "--trainer.accumulate_grad_batches=2"]
    more += [f"--model.backbone.pretrained={tiny_models['qwen3']}", "--model.backbone.dtype=float32"]
    more += ["--data.batch_size=2", "--data.context_tokens=96", "--data.continuation_tokens=16"]
    more += ["--model.eviction.anchors.recent=8", "--trainer.limit_val_batches=0", "--trainer.max_steps=3"]
    more += [f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}"]
    more += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    command = dry("train.sbatch", str(QWEN), *more, SLURM_NTASKS_PER_NODE="1")

    def train() -> dict[str, Tensor]:
        arguments = command[command.index("train.py") + 1 :]
        settings = {"save_config_kwargs": {"overwrite": True}, "trainer_defaults": {"callbacks": [Signal()]}}
        TrainCommandLine(args=arguments, **settings)
        return load_file(run / "final" / "adapter_model.safetensors")

    unstopped = train()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints")  # Slurm would have ended the job before these
    requeued = train()
    assert (run / "checkpoints" / "step=3.ckpt").exists(), "a resumed run's checkpoints lie where they did"
    assert requeued.keys() == unstopped.keys()
    assert all(requeued[name].equal(unstopped[name]) for name in unstopped)
    assert torch.load(run / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2


HELD = """
import pathlib, signal, subprocess, sys, time

def test_that_holds_the_signal():
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("workers", "number"),
    [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGKILL)],
    ids=["alone", "with a worker", "killed before its worker"],
)
def test_a_stopped_run_leaves_nothing_behind(workers: int, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.termination import pytest_configure, pytest_runtest_setup\n")
    (tmp_path / "test_held.py").write_text(HELD)
    options = ["-n", str(workers), "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    run = subprocess.Popen([sys.executable, "-m", "pytest", *options, str(tmp_path / "test_held.py")], cwd=ROOT)
    try:
        child = psutil.Process(int(_written(tmp_path / "child")))
        run.send_signal(number)
        assert run.wait(PATIENCE) in (128 + signal.SIGTERM, -signal.SIGKILL)
        child.wait(PATIENCE)
    finally:
        run.kill()


def _written(path: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text()
