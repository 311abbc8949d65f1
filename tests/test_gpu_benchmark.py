"""benchmarks/gpu.py on the CPU: every part, tiny; limits, what is kept, the table."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from tests.processes import Started

BY_COMMAND = ("tests", "quickstart")
"""Parts that start programs of their own."""


def test_every_part_runs_on_the_cpu_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part for part in gpu.LIMITS if part not in BY_COMMAND]
    assert gpu.main(["--tiny", "--output", str(tmp_path), "--only", *parts]) == 0
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert list(kept) == parts
    for part, result in kept.items():
        assert result["figures"], part
        assert f"| {part} | seconds |" in said
    four_bit, dropout, sharded = (kept[part]["figures"] for part in ("four_bit", "kv_dropout", "sharded"))
    assert sharded["losses, FSDP2 with one rank"] == pytest.approx(sharded["losses, one process"], abs=1e-3)
    assert four_bit["gradients finite"]
    assert all(value < 1e-4 for name, value in dropout.items() if "off by" in name)
    assert gpu.main(["--tiny", "--output", str(tmp_path), "--only", *parts]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == kept, "finished parts are not run again"


def forked(folder: str, script: str, *arguments: str) -> float:
    """Run a program as the benchmark does, but from a process that has imported the libraries."""
    process = Started([script, *arguments], Path(folder) / f"{script}.log", Path(folder))
    assert process.wait() == 0, process.printed[-2000:]
    return 1.0


@pytest.mark.parametrize("part", BY_COMMAND)
def test_parts_that_start_programs_run_on_the_cpu(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_parts._ran", forked)
    assert gpu.main(["--tiny", "--output", str(tmp_path), "--only", part]) == 0
    assert json.loads((tmp_path / f"{part}.json").read_text())["figures"]


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("print('[1]'); import time; time.sleep(60)", {"error": "stopped after 1 s"}),
        ("raise SystemExit('no kernel')", {"error": "exit code 1"}),
        ("print('said'); print({1: 2} and '{\"a\": 1}')", {"figures": {"a": 1}}),
    ],
)
def test_a_part_has_a_process_and_a_limit(
    program: str, wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = gpu.subprocess.run
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda _, **settings: started([sys.executable, "-c", program], **settings)
    )
    result = gpu.in_a_process("step", tmp_path / "log", 1 if "sleep" in program else 60)
    assert result.keys() == wanted.keys()
    assert str(wanted.get("error", "")) in str(result.get("error", ""))
    assert result.get("figures") == wanted.get("figures")


def test_the_limits_are_eight_minutes_together() -> None:
    assert sum(gpu.LIMITS.values()) <= 480
