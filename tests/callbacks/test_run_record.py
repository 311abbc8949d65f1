"""The record of a run: its command, and the commit whose files the command named."""

import subprocess
from pathlib import Path

import pytest

from callbacks.run_record import commit, run_record
from sparsekv_pl.reporting.model_card import model_card
from tests.tiny_training import MakeTrainer


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_command_is_that_of_the_run_also_after_a_resume(
    tiny_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ([], ["--ckpt_path", "last"], ["--ckpt_path=hpc"]):
        monkeypatch.setattr("sys.argv", ["/a/train.py", "fit", "--config", "x.yaml", *more, "--name", "y"])
        assert run_record(tiny_trainer())["command"] == "python train.py fit --config x.yaml --name y"
    monkeypatch.setattr("sys.argv", ["/a/train.py", "fit", "--ckpt_path", "output/other"])
    assert run_record(tiny_trainer())["command"] == "python train.py fit --ckpt_path output/other"


def test_the_commit_of_a_checkout_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git(tmp_path, "init")
    assert commit(tmp_path) is None, "nothing is committed yet"
    tracked = tmp_path / "robust.yaml"
    tracked.write_text("name: robust\n")
    git(tmp_path, "add", "robust.yaml")
    git(tmp_path, "commit", "-m", "the recipe")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "untracked.txt").write_text("not of the checkout")
    found = commit(tmp_path)
    assert found is not None and len(found) >= 12
    assert git(tmp_path, "rev-parse", "HEAD").startswith(found)
    tracked.write_text("name: other\n")
    assert commit(tmp_path) == f"{found}+"


def test_a_card_names_the_commit() -> None:
    training = {"base": "llama", "command": "python train.py fit --config robust.yaml", "commit": "c0ffee123456+"}
    assert "| the command's files are those of commit | c0ffee123456+ |" in model_card(training, None)
    assert "of commit" not in model_card(training | {"commit": None}, None)
