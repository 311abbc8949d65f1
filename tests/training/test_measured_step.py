"""The rate of a step, measured in a few random layers."""

from typing import Any

import pytest
import torch
from kvpress import KnormPress, SnapKVPress

from benchmarks.planned_shapes import EIGHTH, shape
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.objectives import EIT, Layerwise, Mixed, Objective, Reconstruction, SelectionObjective
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.training import measured_step
from sparsekv_pl.training.measured_step import MeasuredStep
from sparsekv_pl.training.step_operations import row_operations
from sparsekv_pl.training.step_shape import ModelShape, StepShape, model_shape

LORA, LAYERS, CPU = Lora(r=4, alpha=8), 12, torch.device("cpu")
CONFIG = shape("qwen3", LAYERS, **EIGHTH)


def measured(objective: Objective) -> tuple[MeasuredStep, ModelShape, StepShape]:
    press = EvictionAugPress([KnormPress(), SnapKVPress(window_size=8)], score_all=True)
    step = StepShape(64, 16, 0.5, press, rows=2, dtype=torch.float32, on_cpu=True)
    model = model_shape("tiny", CONFIG, LORA, torch.float32, False)
    return MeasuredStep(CONFIG, LORA, RealEviction(press), objective), model, step


def test_layers_that_are_not_run_take_as_long_as_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a second a step and half a second a layer; a context is cut, and so are rows."""
    ran: list[tuple[int, int, int]] = []

    def timed(student: Any, batch: Any, *_: Any) -> float:
        layers = student.model.config.num_hidden_layers
        ran.append((layers, *batch["context_ids"].shape))
        return 1 + 0.5 * layers + len(ran) % 2  # the second run of each is the faster

    monkeypatch.setattr(measured_step, "_timed", timed)
    monkeypatch.setattr(measured_step, "MOST_TOKENS", 64)
    run, model, step = measured(EIT())
    tflops = run.tflops(model, step, CPU)
    assert ran == [(2, 1, 64)] * 2 + [(4, 1, 64)] * 2
    operations = sum(row_operations(model, step).values())
    assert tflops == pytest.approx(operations / (1 + 0.5 * LAYERS) / 1e12)


def test_the_training_s_own_step_runs() -> None:
    """Both passes, scores and losses: the clock is read around them alone, and gradients reach the adapter."""
    seen: list[int] = []

    class Objectives(Mixed):
        def __call__(self, view: Any) -> dict[str, torch.Tensor]:
            seen.append(len(view.selections))
            return super().__call__(view)

    run, model, step = measured(Objectives([EIT(), SelectionObjective(), Reconstruction(block_size=8)], [1.0] * 3))
    times = iter([0.0, 1.0] * 8)
    tflops = run.tflops(model, step, CPU, clock=lambda: next(times, 0.0))
    assert seen == [4, 4, 8, 8]  # two presses a layer
    assert tflops == pytest.approx(2 * sum(row_operations(model, step).values()) / 1e12)


def test_what_cannot_run_in_few_layers_says_what_to_do() -> None:
    run, model, step = measured(Layerwise(layer_weights=[1.0] * LAYERS))
    with pytest.raises(ValueError, match=r"cannot run 2 random layers .* one for each.: give a number"):
        run.tflops(model, step, CPU)
