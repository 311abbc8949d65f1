"""The embedded SmolLM2: it finds needles with its full cache, eviction loses them, and a step of training runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from kvpress import ExpectedAttentionPress

from callbacks.curriculum import Curriculum
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule, Setting
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.objectives import EIT, Mixed, SelectionObjective
from sparsekv_pl.schedules import Linear
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeCases, MakeData, MakeTrainer


def test_needles_are_found_with_the_full_cache_and_lost_under_expected_attention(
    tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = EvaluationModule(Backbone(), [Setting(ExpectedAttentionPress(), [0.5])], str(tmp_path))
    data = tiny_cases(lengths=[256], batch_size=8, windows=0, depths=[0.0, 0.25, 0.5, 0.75], cases_per_cell=2)
    tiny_trainer(precision=decide().precision).test(module, data, verbose=False)
    accuracy = {row["press"]: row["base"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert accuracy["full cache"] >= 0.75
    assert accuracy["ExpectedAttention"] <= 0.375


def test_a_step_of_the_quickstarts_training_runs(tiny_data: MakeData, tiny_trainer: MakeTrainer) -> None:
    module = EITModule(Backbone(), RealEviction(ExpectedAttentionPress()), Mixed([EIT(), SelectionObjective()]))
    trainer = tiny_trainer(Curriculum(Linear(0.5, 0.5)), max_steps=1, precision=decide().precision)
    trainer.fit(module, tiny_data(context_tokens=128, retrieval_share=1.0))
    logs = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 < logs["train/loss"] < 20
    assert math.isfinite(logs["train/selection/ExpectedAttention"])
    assert logs["train/kept_share"] == pytest.approx(0.5)
    changed = [p for name, p in module.named_parameters() if "lora_B" in name and bool(p.abs().sum() > 0)]
    assert len(changed) == 4 * 30
    assert all(bool(torch.isfinite(p).all()) for p in changed)
