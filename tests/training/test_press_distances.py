"""Presses are drawn by how far each still is from its ceiling: resumable, and the same within an optimizer step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import ExpectedAttentionPress, KnormPress, RandomPress, SnapKVPress
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import EIT
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from sparsekv_pl.training.press_distances import MEMORY, PressDistances
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, mixed, trained


def press(by_distance: bool = True, **settings: Any) -> EvictionAugPress:
    presses = [SnapKVPress(window_size=8), KnormPress(), ExpectedAttentionPress()]
    return EvictionAugPress(presses, score_all=True, by_distance=by_distance, **settings)


def terms(**distances: float) -> dict[str, torch.Tensor]:
    logged = {f"kept_mass/{name}": torch.tensor(0.5) for name in distances}
    return logged | {f"kept_mass_most/{name}": torch.tensor(0.5 + value) for name, value in distances.items()}


class Draws(Callback):
    """Notes the press and the odds of every batch, and the step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, tuple[float, ...]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        mix = pl_module.press
        self.seen.append((trainer.global_step, mix.drawn, tuple(mix.odds)))


def test_the_odds_follow_the_distances() -> None:
    mix = EvictionAugPress([SnapKVPress(), KnormPress(), RandomPress()], [1.0, 2.0, 1.0], by_distance=True)
    assert mix.odds == [1.0, 2.0, 1.0], "nothing was measured yet"
    distances = PressDistances(mix)
    distances.measure(terms(SnapKV=0.5, Knorm=0.25, Random=0.9))
    distances.measure(terms(SnapKV=0.25, Knorm=0.25))
    assert mix.odds == [1.0, 2.0, 1.0], "the same within an optimizer step"
    distances.settle()
    assert mix.odds == pytest.approx([0.375, 0.5, 0.3125]), "Random cannot train: the mean of the others"
    distances.measure(terms(SnapKV=0.0))
    distances.settle()
    assert mix.distances == pytest.approx({"SnapKV": MEMORY * 0.375, "Knorm": 0.25, "Random": 0.9})
    for _ in range(200):
        distances.measure(terms(SnapKV=0.0))
        distances.settle()
    assert mix.odds[:2] == pytest.approx([0.025, 0.5]), "never less than a tenth of the farthest"
    counts = [sum(mix.draw(step) is one for step in range(2000)) / 2000 for one in mix.presses]
    assert counts == pytest.approx([odd / sum(mix.odds) for odd in mix.odds], abs=0.03)
    distances.measure(terms(Knorm=float("nan")))
    distances.settle()
    assert mix.distances["Knorm"] == 0.25, "a step that is skipped"


def test_distances_that_are_restored_after_the_start_count_for_the_first_step() -> None:
    """A strategy that shards restores then."""
    mix = EvictionAugPress([SnapKVPress(), KnormPress()], by_distance=True)
    saved, resumed = PressDistances(EvictionAugPress([SnapKVPress()], by_distance=True)), PressDistances(mix)
    saved.measure(terms(SnapKV=0.5, Knorm=0.25))
    saved.settle()
    resumed.start()
    resumed.load_state_dict(saved.state_dict())
    assert mix.odds == pytest.approx([0.5, 0.25])


def test_without_the_option_draws_are_as_before() -> None:
    plain, given = press(False), press(False)
    PressDistances(given).measure(terms(SnapKV=0.9, Knorm=0.1))
    given.distances = {"SnapKV": 0.9}
    assert [plain.draw(step) for step in range(50)] == [
        plain.presses[given.presses.index(given.draw(step))] for step in range(50)
    ]
    assert PressDistances(given).state_dict() == {}


def test_a_resumed_run_draws_as_one_that_went_through(
    tmp_path: Path, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    """With validations between, whose draws do not follow the distances, and two micro-batches to a step."""

    def run(folder: str, steps: int, ckpt_path: Any = None) -> tuple[Any, Draws, Path]:
        torch.manual_seed(0)
        module = EITModule(tiny_backbone(), RealEviction(press()), mixed(), optimizer=adamw)
        saves, draws = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_last=True), Draws()
        trainer = tiny_trainer(
            *(Curriculum(Fixed(0.6)), saves, draws),
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=2,
            enable_checkpointing=True,
            limit_val_batches=1,
            val_check_interval=4,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, tiny_data(batch_size=1), ckpt_path=ckpt_path)
        return module, draws, Path(saves.last_model_path)

    whole, straight, _ = run("whole", 6)
    _, first, checkpoint = run("parts", 3)
    resumed, second, _ = run("parts", 6, checkpoint)
    assert first.seen + second.seen == straight.seen
    assert len({odds for _, _, odds in straight.seen}) > 4, "the odds move"
    assert len({drawn for _, drawn, _ in straight.seen}) > 1
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(resumed)[name])


def test_an_objective_that_measures_no_distance_is_refused(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match=r"by_distance follows .* which only the selection objective measures"):
        EITModule(tiny_backbone(), RealEviction(press()), EIT())
    EITModule(tiny_backbone(), RealEviction(press(False)), EIT())
