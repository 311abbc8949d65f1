"""A run of pytest that gets SIGTERM while a test holds that signal ends at once, and so does all that it started."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
HELD = """
import pathlib, signal, subprocess, sys, time

def test_that_holds_the_signal():
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
    time.sleep(600)
"""
PATIENCE = 60


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
