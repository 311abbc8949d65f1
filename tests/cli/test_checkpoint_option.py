"""Values from the command line: limits keep their types, --ckpt_path runs no code, no written configuration is lost."""

import functools
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import run
from sparsekv_pl.cli.saved_config import SaveEvaluationConfig, SaveRunConfig
from tests.refusals import refusal
from train import TrainCommandLine

MODEL = "--model=lightning.pytorch.demos.boring_classes.BoringModel"


@pytest.fixture
def fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were handed to ``Trainer.fit``, which does nothing."""
    models: list[Any] = []

    @functools.wraps(Trainer.fit)
    def fit(_trainer: Trainer, model: Any, **_: Any) -> None:
        models.append(type(model).__name__)

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    return models


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of plain values, and with a class in its hyper-parameters whose module makes a folder."""
    package = tmp_path / "from_checkpoint.py"
    package.write_text(
        "import os\nos.mkdir('ran')\nfrom lightning.pytorch.demos.boring_classes import BoringModel as It"
    )
    chosen = {"_class_path": "from_checkpoint.It", "_instantiator": "x", "trust_remote_code": True}
    content = {"global_step": 1, "state_dict": {}, "optimizer_states": [], "hyper_parameters": chosen}
    torch.save(content, tmp_path / "it.ckpt")
    return tmp_path / "it.ckpt"


def test_settings_are_not_taken_from_a_checkpoint(
    checkpoint: Path, fitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(checkpoint.parent)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    for path in (str(checkpoint), f"~/{checkpoint.name}", "~"):
        run(lambda path=path: TrainCommandLine(args=["fit", MODEL, f"--ckpt_path={path}"], save_config_callback=None))  # type: ignore[misc]
    assert fitted == ["BoringModel"] * 3
    assert not (checkpoint.parent / "ran").exists()
    assert "from_checkpoint" not in sys.modules


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04half a zip"], ids=["empty", "text", "cut"])
def test_a_file_that_is_none_is_refused_before_anything_is_made(
    content: bytes, fitted: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "it.ckpt"
    path.write_bytes(content)
    assert refusal(TrainCommandLine, "fit", MODEL, f"--ckpt_path={path}").startswith(
        f"error: --ckpt_path {path}: it is "
    )
    assert "give a local file" in refusal(TrainCommandLine, "fit", MODEL, "--ckpt_path=https://host/it.ckpt")
    assert fitted == []


@pytest.mark.parametrize(
    ("command_line", "command"),
    [(TrainCommandLine, "fit"), (TrainCommandLine, "validate"), (EvaluateCommandLine, "test")],
)
def test_code_in_checkpoints_cannot_be_allowed(command_line: Any, command: str, fitted: list[Any]) -> None:
    assert "error: weights_only is false: " in refusal(command_line, command, MODEL, "--weights_only=false")
    assert fitted == []


def test_an_evaluation_reads_no_checkpoint(checkpoint: Path) -> None:
    line = refusal(EvaluateCommandLine, "test", MODEL, f"--ckpt_path={checkpoint}")
    assert line == f"error: ckpt_path is {checkpoint}: set model.backbone.adapter to the training's export instead"


def test_a_run_that_is_refused_leaves_an_earlier_one_where_it_is(fitted: list[Any], tmp_path: Path) -> None:
    """Evaluations look for it there."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    arguments = ["fit", MODEL, f"--trainer.default_root_dir={tmp_path}/run"]
    bad = ["--trainer.callbacks=callbacks.checkpoint.SafeCheckpoint", "--trainer.callbacks.every_n_train_steps=0"]
    assert "every_n_train_steps=0" in refusal(TrainCommandLine, *arguments, *bad)
    assert final.exists() and not fitted
    run(lambda: TrainCommandLine(args=arguments, save_config_callback=None))
    assert not final.exists() and fitted


EITHER = [
    name
    for name, parameter in inspect.signature(Trainer).parameters.items()
    if {int, float} <= set(get_args(parameter.annotation))
]


@pytest.mark.parametrize("value", ["1", "2", "1.0", "0.5"])
def test_a_count_stays_a_count_and_a_share_a_share(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    options = [f"--trainer.{name}={value}" for name in EITHER]
    with pytest.raises(SystemExit):
        EvaluateCommandLine(args=["test", "--config=configs/evaluate/quickstart.yaml", *options, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert {name: repr(printed[name]) for name in EITHER} == dict.fromkeys(EITHER, value)


def test_there_are_such_options() -> None:
    assert {"limit_test_batches", "limit_val_batches", "overfit_batches", "val_check_interval"} <= set(EITHER)


@pytest.mark.parametrize(("kind", "name"), [(SaveRunConfig, "config.yaml"), (SaveEvaluationConfig, "evaluation.yaml")])
def test_a_configuration_that_a_user_wrote_is_not_replaced(
    kind: type[SaveRunConfig], name: str, tmp_path: Path
) -> None:
    """Runs without a name and a logger save theirs beside it."""
    trainer: Any = SimpleNamespace(log_dir=None, default_root_dir=str(tmp_path), is_global_zero=False)
    trainer.strategy = SimpleNamespace(broadcast=lambda value: value)
    module: Any = SimpleNamespace(output=tmp_path)
    callback: Any = kind(None, Namespace())  # type: ignore[arg-type]
    (tmp_path / name).write_text("# my notes\nname: first\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/{name} is a configuration that you wrote"):
        callback.setup(trainer, module, "fit")
    for saved in ("# lightning.pytorch==2.6.6\nname: first\n", ""):
        (tmp_path / name).write_text(saved)
        callback.setup(trainer, module, "fit")
