"""Without a terminal, a run prints lines of progress: a training by steps, everything else by batches and pieces."""

import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.progress import StepsBar
from callbacks.progress_lines import ProgressLines, progress
from sparsekv_pl.evaluation import pace
from sparsekv_pl.evaluation.run_output import piece_done
from tests.callbacks.checkpoint_cases import Line
from tests.tiny_training import MakeTrainer


class Measured(Line):
    """Logs terms of a loss, and measures in three pieces."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        self.log_dict({"train/loss": 2.5, "train/kl": 0.125, "train/loss_layer_01": 1.0, "other": 1.0})
        self.log_dict({"train/kept_mass/Knorm": 0.5, "train/kept_mass_most/Knorm": 0.75})
        return super().training_step(torch.ones(1, 100), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self.log_dict({"val/perplexity": 12.0, "val/loss_layer_01": 1.0})

    def test_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        for done in (1, 2, 3):
            piece_done(self, done, 3)

    predict_step = test_step


class Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """Each of a context of 40 tokens and a continuation of 10."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"context_ids": torch.ones(1, 40), "continuation_ids": torch.ones(1, 10), "labels": torch.ones(1, 10)}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> ProgressLines:
    """Return progress lines with a clock that advances by five seconds at every reading."""
    made = ProgressLines()
    ticks = itertools.count(0, 5)
    monkeypatch.setattr(pace.Pace, "clock", staticmethod(lambda: float(next(ticks))))
    made.clock = lambda: float(next(ticks))
    return made


def test_a_training_has_a_line_at_every_logging_interval_and_validation(
    lines: ProgressLines, tiny_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "log_every_n_steps": 2, "accumulate_grad_batches": 1}
    trainer = tiny_trainer(lines, enable_progress_bar=True, limit_val_batches=2, val_check_interval=4, **settings)
    trainer.fit(Measured(), DataLoader(Batches(), batch_size=None), DataLoader(Batches(), batch_size=None))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "validation"))]
    steps = [line.partition(":")[0] for line in said]
    sanity, after = "validation before the first step", "validation after step 4"
    assert steps == [sanity, "step 2 of 5", "step 4 of 5", after, "step 5 of 5"]
    assert said[1].partition(": ")[2].split(", ")[:3] == [
        *("loss 2.5", "kl 0.125", "kept_mass/Knorm 0.5 of 0.75"),
    ]
    assert said[1].endswith("20 tokens/s, 7.5 s left")  # 100 tokens in 5 s; 5 s for 2 steps leave 7.5 s for 3
    assert "perplexity 12, took" in said[3]
    assert "layer" not in "".join(said) and "other" not in "".join(said)


@pytest.mark.parametrize(("verb", "what"), [("test", "evaluation"), ("predict", "analysis")])
def test_measuring_has_a_line_every_half_a_minute_also_within_a_batch(
    verb: str, what: str, lines: ProgressLines, tiny_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(lines, enable_progress_bar=True)
    getattr(trainer, verb)(Measured(), DataLoader(Batches(), batch_size=None))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(what)]
    assert said[0] == f"{what}: 0 of 6 batches, 1 of 3 measurements of the next"  # it may have taken most of the batch
    assert "left" in said[1]
    assert said[-1].startswith(f"{what}: 6 of 6 batches, ") and said[-1].endswith("tokens of cases/s")
    assert 3 <= len(said) < 12


def test_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress(), ProgressLines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress(), StepsBar)


def test_other_ranks_say_nothing(lines: ProgressLines, capsys: pytest.CaptureFixture[str]) -> None:
    lines.disable()
    lines.print("step")
    assert not capsys.readouterr().out
