"""The local files that lm_eval's tasks name are found, whatever else their settings say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsekv_pl.evaluation.lm_eval_tasks import named_files


def named(**settings: Any) -> list[str]:
    manager: Any = SimpleNamespace(task_index={"task": SimpleNamespace(cfg=settings)})
    return named_files(manager, "task")


@pytest.mark.parametrize(
    "text", ["Q: which one? " * 30, f"examples/{'a' * 256}", "a" * 5000, "", " ", ".", "/", ": ", "one\ntwo", "a\0b"]
)
def test_a_text_of_a_task_is_no_file(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.json").write_text("written by a run")
    assert named(description=text, fewshot_config={"samples": [{"target": text}]}) == []


def test_a_file_that_a_task_names_counts_by_its_content(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    settings = {"dataset_kwargs": {"data_files": {"test": str(rows)}}, "target_delimiter": ""}
    first = named(**settings)
    assert len(first) == 1
    rows.write_text("{ }")
    assert named(**settings) != first
