"""A real process of evaluate.py, killed with SIGKILL while it measures, then run again."""

import json
import signal
import time
from pathlib import Path

from tests.processes import ROOT, Started

PIECES = 2 * 5
"""Batches x points of the run below."""


def command(output: Path, pretrained: str) -> list[str]:
    config = ROOT / "configs" / "evaluate" / "niah.yaml"
    arguments = [f"--model.backbone.pretrained={pretrained}", "--model.backbone.dtype=float32"]
    arguments += [f"--model.output={output}", f"--trainer.logger.save_dir={output}", "--trainer.accelerator=cpu"]
    arguments += ["--data.lengths=[512]", "--data.depths=[0.5]", "--data.cases_per_cell=2", "--data.batch_size=2"]
    arguments += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    return ["evaluate.py", "test", "--config", str(config), *arguments]


def finished(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (output / "results").glob("*.jsonl"))


def run(output: Path, pretrained: str) -> list[dict[str, object]]:
    process = Started(command(output, pretrained), output.with_suffix(".log"))
    assert process.wait() == 0, process.printed[-2000:]
    rows = json.loads((output / "report.json").read_text())["rows"]
    return [{name: row[name] for name in ("press", "compression_ratio", "base", "cases", "f1_base")} for row in rows]


def test_killed_and_rerun_equals_uninterrupted(tiny_models: dict[str, str], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", tiny_models["llama"])
    assert finished(tmp_path / "whole") == PIECES
    halves = tmp_path / "halves"
    process = Started(command(halves, tiny_models["llama"]), tmp_path / "log")
    while process.poll() is None and finished(halves) < 3:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed: give it more to do"
    kept = {path: path.read_bytes() for path in (halves / "results").glob("*.jsonl")}
    assert 3 <= finished(halves) < PIECES
    assert not (halves / "report.json").exists()
    assert run(halves, tiny_models["llama"]) == whole
    assert finished(halves) == PIECES
    for path, lines in kept.items():
        whole_lines = lines[: lines.rfind(b"\n") + 1]
        assert path.read_bytes().startswith(whole_lines), "what was finished before the kill was done again"
