"""The ablations' runner: its commands, finished work, and the table of finished reports."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations
from benchmarks.ablations import BASE, as_markdown, run, table


def row(press: str, ratio: float, metric: str, base: float, trained: float, cases: int = 4) -> dict[str, Any]:
    return {
        "press": press,
        "compression_ratio": ratio,
        "metric": metric,
        "base": base,
        "trained": trained,
        "cases": cases,
        "error": None,
    }


def report(folder: Path, needles: float, perplexity: float) -> None:
    folder.mkdir(parents=True)
    rows = [
        row("full cache", 0.0, "needle_accuracy", 0.5, 1.0),
        row("full cache", 0.0, "perplexity", 12.0, 11.5, cases=2),
        row("SnapKV", 0.75, "needle_accuracy", 0.25, needles),
        row("SnapKV", 0.75, "perplexity", 14.0, perplexity, cases=2),
        row("LagKV", 0.5, "needle_accuracy", 0.0, 0.0) | {"error": "out of memory"},
    ]
    (folder / "report.json").write_text(json.dumps({"rows": rows, "training": {"seconds": 90}}))


def test_the_table_has_the_untouched_model_once_and_a_row_for_every_ablation(tmp_path: Path) -> None:
    report(tmp_path / BASE, 0.75, 13.0)
    report(tmp_path / "loss_lm", 0.5, 13.5)
    rows = table(tmp_path, [BASE, "loss_lm"])
    assert [made["ablation"] for made in rows] == ["(untouched)", BASE, "loss_lm"]
    assert [made["SnapKV 0.75"] for made in rows] == ["1/4", "3/4", "2/4"]
    assert [made["perplexity full cache"] for made in rows] == ["12.00", "11.50", "11.50"]
    assert [made["minutes"] for made in rows] == ["", 1.5, 1.5]
    assert {made["LagKV 0.5"] for made in rows} == {"failed"}
    lines = as_markdown(rows).splitlines()
    assert lines[0].startswith("| ablation | minutes | full cache |") and len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(ablations, "_logged", lambda _command, log, _threads: started.append(log.name))
    run("loss_lm", tmp_path, threads=1)
    assert started == ["train.log", "evaluate.log"]
    (tmp_path / "loss_lm" / "final").mkdir()
    run("loss_lm", tmp_path, threads=1)
    assert started[2:] == ["evaluate.log"]
    (tmp_path / "loss_lm" / "report.json").touch()
    run("loss_lm", tmp_path, threads=1)
    assert len(started) == 3


def test_the_untouched_model_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "_logged", lambda _command, _log, _threads: None)
    results = tmp_path / BASE / "results"
    results.mkdir(parents=True)
    for name in ("base_SnapKV.0.jsonl", "trained_SnapKV.0.jsonl"):
        (results / name).write_text(name)
    run("loss_lm", tmp_path, threads=1)
    assert [path.name for path in (tmp_path / "loss_lm" / "results").iterdir()] == ["base_SnapKV.0.jsonl"]


def test_one_that_fails_leaves_the_table_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str, output: Path, _threads: int) -> None:
        if name == "loss_lm":
            raise RuntimeError("train.py ended with 1")
        report(output / name, 0.5, 13.0)

    monkeypatch.setattr(ablations, "run", measured)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--output", str(tmp_path), "--only", "loss_lm", "loss_eit"])
    with pytest.raises(SystemExit, match=r"loss_lm failed: train\.py ended with 1"):
        ablations.main()
    assert "| loss_eit |" in (tmp_path / "table.md").read_text()
    assert "| loss_eit |" in capsys.readouterr().out
