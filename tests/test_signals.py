"""Real processes of train.py and evaluate.py that receive a signal: what they save, exit codes, and resuming."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback

from tests.processes import Started
from tests.test_evaluate_killed import PIECES, command, finished

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
