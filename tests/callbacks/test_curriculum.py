"""The curriculum in a real Trainer: ratios per step, adaptation, checkpoints, clear errors."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.curriculum import Curriculum
from sparsekv_pl.schedules import Adaptive, Linear, Schedule, Spread
from tests.tiny_training import MakeTrainer


class Evicting(BoringModel):
    """A substitute for the training module that records each batch's ratio and logs given perplexities."""

    def __init__(self, perplexities: list[float] | None = None) -> None:
        super().__init__()
        self.compression_ratio = 0.0
        self.ratios: list[float] = []
        self.perplexities = iter(perplexities or [])

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.ratios.append(self.compression_ratio)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self.log("val/perplexity_evicted", 2.0)  # must be ignored
        else:
            self.log("val/perplexity_evicted", next(self.perplexities))


class Plain(BoringModel):
    """A module without compression_ratio that logs nothing."""


class Deaf(Evicting):
    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", 1.0)


@pytest.fixture
def trainer(tiny_trainer: MakeTrainer) -> MakeTrainer:
    return partial(tiny_trainer, num_sanity_val_steps=1, limit_val_batches=1, max_epochs=-1)


def test_every_batch_gets_its_steps_ratio_and_it_is_logged(trainer: MakeTrainer) -> None:
    module = Evicting([3.0])
    run = trainer(Curriculum(Linear(0.1, 0.4, steps=3)))
    run.fit(module)
    assert module.ratios == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert run.callback_metrics["curriculum/compression_ratio"] == pytest.approx(0.4)


def test_all_batches_of_one_optimizer_step_share_a_ratio(trainer: MakeTrainer) -> None:
    module = Evicting([3.0])
    run = trainer(Curriculum(Spread(Linear(0.1, 0.7, 2))), max_steps=2, accumulate_grad_batches=3)
    run.fit(module)
    assert len(module.ratios) == 6
    assert [len(set(module.ratios[i : i + 3])) for i in (0, 3)] == [1, 1]
    assert module.ratios[0] != module.ratios[3]


def test_adaptive_learns_from_validation_but_not_from_the_sanity_check(trainer: MakeTrainer) -> None:
    schedule = Adaptive(start=0.1, step_size=0.2, back_off=0.1)
    module = Evicting([20.0, 20.0, 40.0])
    trainer(Curriculum(schedule), max_steps=6, val_check_interval=2).fit(module)
    assert module.ratios == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.3, 0.3])
    assert schedule.state_dict() == {"level": pytest.approx(0.2), "best": 20.0, "held": 0}


def test_validating_alone_teaches_nothing(trainer: MakeTrainer) -> None:
    schedule = Adaptive()
    trainer(Curriculum(schedule)).validate(Evicting([20.0]), verbose=False)
    assert schedule.best is None


def test_the_state_comes_back_with_the_checkpoint(trainer: MakeTrainer, tmp_path: Path) -> None:
    def adaptive() -> Adaptive:
        return Adaptive(start=0.1, step_size=0.2)

    perplexities = [20.0, 19.0, 18.0]
    straight = Evicting(perplexities)
    trainer(Curriculum(adaptive()), max_steps=6, val_check_interval=2).fit(straight)

    first = trainer(Curriculum(adaptive()), max_steps=4, val_check_interval=2)
    first.fit(Evicting(perplexities))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Evicting(perplexities[2:])
    schedule = adaptive()
    second = trainer(Curriculum(schedule), max_steps=6, val_check_interval=2)
    second.fit(resumed, ckpt_path=tmp_path / "half.ckpt")

    assert resumed.ratios == straight.ratios[4:] == pytest.approx([0.3, 0.3])
    assert schedule.best == 18.0


@pytest.mark.parametrize("schedule", [Adaptive(), Spread(Adaptive())])
def test_a_metric_that_nobody_logs_is_named_with_those_that_exist(trainer: MakeTrainer, schedule: Schedule) -> None:
    run = trainer(Curriculum(schedule, monitor="val/perplexity_evict"), val_check_interval=2)
    with pytest.raises(ValueError, match=r"'val/perplexity_evict', which validation did not log.*'val/loss'"):
        run.fit(Deaf())


def test_pure_schedules_need_no_metric_and_no_validation(trainer: MakeTrainer) -> None:
    module = Deaf()
    trainer(Curriculum(Linear()), limit_val_batches=0).fit(module)
    trainer(Curriculum(Linear()), val_check_interval=2).fit(module)
    assert len(module.ratios) == 8


def test_shares_follow_the_trainers_max_steps(trainer: MakeTrainer) -> None:
    module = Evicting()
    trainer(Curriculum(Spread(Linear(0.2, 0.6), low=0.5)), max_steps=4).fit(module)
    assert module.ratios[:3] == pytest.approx([0.2, 0.3, 0.4])


def test_adaptive_without_validation_stops_before_training(trainer: MakeTrainer) -> None:
    module = Evicting()
    with pytest.raises(ValueError, match="no validation"):
        trainer(Curriculum(Adaptive()), limit_val_batches=0).fit(module)
    assert module.ratios == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"limit_val_batches": 1.0}, "no cases"), ({"val_check_interval": 5}, "after 5 of 4 batches")],
)
def test_adaptive_that_would_never_learn_stops_before_training(
    trainer: MakeTrainer, settings: dict[str, Any], why: str
) -> None:
    module = Evicting([20.0, 20.0])
    if "limit_val_batches" in settings:
        module.val_dataloader = lambda: DataLoader([])  # type: ignore[method-assign, arg-type, return-value]
    with pytest.raises(ValueError, match=f"Adaptive adapts to 'val/perplexity_evicted', but .*{why}"):
        trainer(Curriculum(Adaptive()), **settings).fit(module)
    assert module.ratios == []


def test_a_module_that_does_not_evict_stops_before_training(trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="Plain has no attribute compression_ratio"):
        trainer(Curriculum(Linear())).fit(Plain())


def test_the_exported_state_is_json_and_says_what_was_trained() -> None:
    schedule = Spread(Adaptive(start=0.2), low=0.2)
    state = json.loads(json.dumps(Curriculum(schedule).export_state(step=7)))
    assert state["step"] == 7
    assert state["compression_ratio"] == 0.2
    assert state["state"] == {"level": 0.2, "best": None, "held": 0}
    assert state["schedule"]["class_path"] == "sparsekv_pl.schedules.Spread"
    assert state["schedule"]["init_args"]["schedule"]["init_args"]["start"] == 0.2


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    Spread(Linear(steps=9)).ratio(3)
    assert torch.equal(before, torch.get_rng_state())
