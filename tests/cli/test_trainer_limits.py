"""Numbers of batches and shares keep their types: for Lightning 1 is one batch, and 1.0 is all of them."""

import inspect
import sys
from typing import get_args

import pytest
import yaml
from lightning.pytorch import Trainer

from evaluate import EvaluateCommandLine

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
