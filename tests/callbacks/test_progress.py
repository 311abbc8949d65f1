"""A training's bar counts optimizer steps, also with accumulation and in resumed runs."""

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from callbacks.checkpoint import SafeCheckpoint
from callbacks.progress import StepsBar
from tests.callbacks.checkpoint_cases import Line
from tests.tiny_training import MakeTrainer
from train import TrainCommandLine

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


class Shown(Callback):
    """Record the bar's state when a micro-batch starts, and after the last one."""

    def __init__(self, bar: StepsBar) -> None:
        self.bar = bar
        self.states: list[tuple[str, float, float | None]] = []

    def record(self) -> None:
        assert self.bar.progress is not None
        task = self.bar.progress.tasks[self.bar.train_progress_bar_id or 0]
        self.states.append((task.description.split("]")[-1], task.completed, task.total))

    def on_train_batch_start(self, *_: Any) -> None:
        self.record()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.record()


@pytest.fixture
def shown(tiny_trainer: MakeTrainer, tmp_path: Path) -> Any:
    def run(**settings: Any) -> list[tuple[str, float, float | None]]:
        ckpt_path = settings.pop("ckpt_path", None)
        bar = StepsBar()
        shown, saver = Shown(bar), SafeCheckpoint(2, 2, str(tmp_path))
        switches: dict[str, Any] = {"enable_checkpointing": True, "enable_progress_bar": True}
        tiny_trainer(shown, bar, saver, **switches, **settings).fit(Line(), ckpt_path=ckpt_path)
        return shown.states

    return run


def test_accumulated_batches_are_one_step(shown: Any) -> None:
    said = shown(max_steps=2, accumulate_grad_batches=3)
    assert said == [("Training", done, 2) for done in (0, 0, 0, 1, 1, 1, 2)]


def test_a_resumed_run_starts_where_it_was(shown: Any) -> None:
    shown(max_steps=2, max_epochs=-1)
    assert shown(max_steps=4, max_epochs=-1, ckpt_path="last") == [("Training", done, 4) for done in (2, 3, 4)]


def test_without_a_last_step_epochs_are_counted(shown: Any) -> None:
    said = shown(max_steps=-1, max_epochs=1, limit_train_batches=2)
    assert [text.strip() for text, _, _ in said] == ["Epoch 0/0"] * 3
    assert [counts for _, *counts in said] == [[done, 2] for done in (0, 1, 2)]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--trainer.enable_progress_bar=true", [StepsBar]),
        ("--trainer.enable_progress_bar=false", []),
        ("--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar", [TQDMProgressBar]),
    ],
)
def test_a_training_has_it_unless_it_has_another_or_none(
    option: str, expected: list[type], tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    arguments = ["--config", str(QUICKSTART), f"--model.backbone.pretrained={tiny_models['llama']}", option]
    trainer = TrainCommandLine(args=arguments, run=False, save_config_callback=None).trainer
    assert [type(made) for made in trainer.callbacks if isinstance(made, ProgressBar)] == expected
    assert any(isinstance(made, SafeCheckpoint) for made in trainer.callbacks), "the config's own stay"


def test_a_new_epoch_does_not_begin_anew(shown: Any) -> None:
    said = shown(max_steps=4, max_epochs=-1, limit_train_batches=2)
    assert [counts for _, *counts in said] == [[done, 4] for done in (0, 1, 2, 3, 4)]
