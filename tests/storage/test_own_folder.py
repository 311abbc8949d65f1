"""A folder is held by one running process and free after a kill; an impossible folder is refused at the start."""

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import CommandLine
from sparsekv_pl.cli.run_folders import TRAINING, RunFolders
from sparsekv_pl.storage.own_folder import claimed, locked
from sparsekv_pl.storage.records import Results
from tests.processes import FORKSERVER
from tests.refusals import refusal
from train import TrainCommandLine

ROOT = Path(__file__).parents[2]


def _hold(folder: Path, workers: SimpleQueue[int]) -> None:
    with claimed(folder, "key", "training"):
        worker = os.fork()  # as a DataLoader has them
        if worker:
            workers.put(worker)
        time.sleep(600)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """A live process that trains in ``tmp_path``/run, with a worker that outlives it."""
    workers: SimpleQueue[int] = FORKSERVER.SimpleQueue()
    process = FORKSERVER.Process(target=_hold, args=(tmp_path / "run", workers))
    process.start()
    worker = workers.get()
    yield process
    process.kill()
    os.kill(worker, signal.SIGKILL)


def test_a_folder_is_one_live_process_s(holder: BaseProcess, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    by = rf"key={folder}: process {holder.pid} on [^\n]*: wait for it, or give [^\n]*$"
    with pytest.raises(ValueError, match=by), claimed(folder, "key", "training"):
        pass
    with claimed(folder, "key", "report"):
        pass  # an export of a live training may be measured
    holder.kill()
    holder.join()
    for _ in range(2):
        with claimed(folder, "key", "training"):
            pass


def test_a_folder_under_two_names_is_not_refused_to_the_run_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with RunFolders() as folders:
        for name in ("run", "disk"):
            folders.claim("key", tmp_path / name, TRAINING)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):  # a lock that is a file's existence would stand there the second time
        with claimed(tmp_path, "key", "training"), locked(tmp_path / ".lock"):
            pass
        Results(tmp_path / "results").put("key", [{"a": 1}], "trained")
    assert Results(tmp_path / "results").get("key") == [{"a": 1}]
    assert caplog.text.count(f"{tmp_path} is on a disk without locks") == 1


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the expensive part began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(CommandLine, "instantiate_classes", load)


COMMANDS = {
    "train": (TrainCommandLine, "fit", "quickstart.yaml", "--trainer.default_root_dir"),
    "export": (TrainCommandLine, "fit", "quickstart.yaml", "--export.directory"),
    "measure": (EvaluateCommandLine, "test", "evaluate/niah.yaml", "--model.output"),
    "analyze": (EvaluateCommandLine, "predict", "analyze/statistics.yaml", "--model.output"),
}


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_is_a_line_before_the_model_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, name, config, key = COMMANDS[command]
    file = tmp_path / "file"
    file.write_text("")

    def said(folder: Path) -> str:
        text = refusal(line, name, f"--config={ROOT}/configs/{config}", f"{key}={folder}")
        assert f"{key.removeprefix('--')}={folder}: " in text
        return text

    assert "give a" in said(file / "below")
    assert "give" in said(Path("/proc/self/below"))  # where root cannot write either
    assert "give a shorter path" in said(tmp_path / ("long" * 80))
    assert "give a shorter path" in said(tmp_path / ("x/" * 1990))

    def full(lock: FileLock, **settings: Any) -> Any:
        if "full" in lock.lock_file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), lock.lock_file)
        return acquire(lock, **settings)

    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", full)
    assert "make room" in said(tmp_path / "full")


@pytest.mark.usefixtures("nothing_is_loaded", "holder")
def test_a_second_training_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = f"--config={ROOT}/configs/quickstart.yaml"
    said = refusal(TrainCommandLine, "fit", config, f"--trainer.default_root_dir={tmp_path}/run")
    assert "writes its training there" in said
    with pytest.raises(AssertionError, match="the expensive part began"):
        TrainCommandLine(args=["fit", config, "--name=other"], save_config_callback=None)
