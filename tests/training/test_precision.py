"""Every precision trains under real eviction with a selection loss, close to float32; others are refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import ExpectedAttentionPress, SnapKVPress
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from typing_extensions import override

from callbacks.curriculum import Curriculum
from sparsekv_pl.cli.command_line import run
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives import Mixed, Objective, StudentView
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, mixed, trained
from train import TrainCommandLine


def fp16(init_scale: float = 2.0**16) -> dict[str, Any]:
    """Float16 with its scaler, which Lightning's ``precision="16-mixed"`` does not do on a CPU, though torch can."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))]}


PRECISIONS: dict[str, dict[str, Any]] = {
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": fp16(2.0**8),  # overflows in no step, so that all of them train
}
TOLERANCE = {"bf16-mixed": 0.03, "bf16-true": 0.06, "16-mixed": 0.01}
"""Relative, of each term at each of the first steps."""


class Terms(Callback):
    """Each step's logged terms."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        logged = {name: v.clone() for name, v in trainer.callback_metrics.items() if name.startswith("train/")}
        self.steps.append(logged)


class Watched(Objective):
    """The mixed objective, recording its terms before they are logged."""

    def __init__(self) -> None:
        self.inner: Mixed = mixed()
        self.terms: list[dict[str, Tensor]] = []

    request = Request(teacher=True, scores=True)

    @override
    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = self.inner(view)
        self.terms.append(terms)
        return terms


def module(backbone: Any, objective: Objective | None = None) -> EITModule:
    torch.manual_seed(0)
    press = EvictionAugPress([SnapKVPress(window_size=8), ExpectedAttentionPress()], score_all=True)
    return EITModule(backbone, RealEviction(press), objective or mixed(), optimizer=adamw)


@pytest.fixture(scope="module")
def runs(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> dict[str, tuple[EITModule, list[dict[str, Tensor]], Watched]]:
    """Three steps in each precision, from the same weights on the same data."""
    made: dict[str, tuple[EITModule, list[dict[str, Tensor]], Watched]] = {}
    for name, settings in PRECISIONS.items():
        terms, objective = Terms(), Watched()
        trains = module(tiny_backbone(), objective)
        trainer = tiny_trainer(Curriculum(Fixed(0.5)), terms, max_steps=3, gradient_clip_val=1.0, **settings)
        assert trainer.precision == name
        trainer.fit(trains, tiny_data())
        made[name] = trains, terms.steps, objective
    return made


@pytest.mark.parametrize("precision", TOLERANCE)
def test_losses_are_finite_and_close_to_float32(precision: str, runs: Any) -> None:
    expected, found = runs["32-true"][1], runs[precision][1]
    assert len(found) == 3
    for step in range(3):
        for term in ("loss", "cross_entropy", "selection/SnapKV", "selection/ExpectedAttention"):
            value, reference = float(found[step][f"train/{term}"]), float(expected[step][f"train/{term}"])
            assert math.isfinite(value)
            assert value == pytest.approx(reference, rel=TOLERANCE[precision]), term


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_are_computed_in_float32(precision: str, runs: Any) -> None:
    _, _, objective = runs[precision]
    assert len(objective.terms) == 3
    assert {value.dtype for terms in objective.terms for value in terms.values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_adapters_keep_float32_unless_everything_is_halved(precision: str, dtype: torch.dtype, runs: Any) -> None:
    assert {value.dtype for value in trained(runs[precision][0]).values()} == {dtype}


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [({}, {"precision": "16-true"}), ({"lora": None, "dtype": "float16"}, fp16())],
    ids=["16-true", "full float16 weights"],
)
def test_float16_parameters_are_refused_before_training(
    backbone: dict[str, Any],
    settings: dict[str, Any],
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
) -> None:
    terms = Terms()
    with pytest.raises(ValueError, match=r"would train in float16 .* give precision 16-mixed"):
        tiny_trainer(Curriculum(Fixed(0.5)), terms, **settings).fit(module(tiny_backbone(**backbone)), tiny_data())
    assert not terms.steps


@pytest.mark.parametrize("precision", ["16-mixed", "16"])
def test_float16_on_a_cpu_is_not_silently_bfloat16(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    args = ["fit", "--config", str(quickstart), f"--trainer.precision={precision}", "--trainer.accelerator=cpu"]
    with pytest.raises(SystemExit, match=f"precision={precision} would become bf16-mixed.*give bf16-mixed"):
        run(lambda: TrainCommandLine(args=args, save_config_callback=None))
