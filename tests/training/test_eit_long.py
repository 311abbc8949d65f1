"""Training on contexts longer than the model's positions: what works, and the errors of what does not."""

from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KeyRerotationPress, SnapKVPress

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.objectives import EIT, LM, Mixed, Objective, Reconstruction, SelectionObjective
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained

LIMIT = 100
"""Positions of the model. The data has contexts of 96 tokens and continuations of 16 (of text) to 67 (of needles)."""


def module(backbone: Any, press: BasePress, objective: Objective | None = None, limit: int = LIMIT) -> EITModule:
    made = EITModule(backbone, RealEviction(press, 24, 32, checkpoint=True), objective or LM(), adamw)
    causal_lm(made.model).config.max_position_embeddings = limit
    return made


def rerotating() -> BasePress:
    return KeyRerotationPress(ExpectedAttentionPress())


@pytest.mark.parametrize("lora", [True, False])
def test_rerotated_keys_and_a_budget_train_beyond_them(
    lora: bool, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    made = module(tiny_backbone() if lora else tiny_backbone(lora=None), rerotating())
    before = trained(made)
    tiny_trainer(Curriculum(Fixed(0.5)), max_steps=2).fit(made, datamodule=tiny_data())
    after = trained(made)
    assert all(bool(parameter.isfinite().all()) for parameter in after.values())
    assert any(not torch.equal(after[name], parameter) for name, parameter in before.items())


@pytest.mark.parametrize("objective", [EIT(), SelectionObjective(), Mixed([LM(), EIT()])], ids=repr)
def test_a_teacher_cannot_read_them(
    objective: Objective, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    message = r"teacher reads .* 112 tokens, .* trained on 100 positions: use an objective without a teacher \(LM\), or"
    with pytest.raises(ValueError, match=message):
        tiny_trainer().fit(module(tiny_backbone(), rerotating(), objective), datamodule=tiny_data())
    fits = module(tiny_backbone(), rerotating(), objective, 163)
    tiny_trainer(Curriculum(Fixed(0.5)), max_steps=1).fit(fits, datamodule=tiny_data())


def test_nor_can_validation(tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"it reads 112 tokens, .* trained on 100 positions: set trainer.limit_val_"):
        tiny_trainer(limit_val_batches=1).fit(module(tiny_backbone(), rerotating()), datamodule=tiny_data())


def test_nor_can_a_student_that_moves_no_keys(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    press = SnapKVPress(window_size=8)
    with pytest.raises(ValueError, match=r"takes 112 positions, .* trained on 100 .*KeyRerotationPress"):
        tiny_trainer().fit(module(tiny_backbone(), press), datamodule=tiny_data())
    dropping = EITModule(tiny_backbone(), KVDropout(Anchors(recent=8), query_chunk=32), LM(), adamw)
    causal_lm(dropping.model).config.max_position_embeddings = LIMIT
    with pytest.raises(ValueError, match="takes 112 positions"):
        tiny_trainer().fit(dropping, datamodule=tiny_data())


def test_a_question_after_the_context_must_fit_too(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    asking = EITModule(tiny_backbone(), RealEviction(SnapKVPress(window_size=8)), Reconstruction(), adamw)
    causal_lm(asking.model).config.max_position_embeddings = 112  # as many as context and continuation take
    with pytest.raises(ValueError, match=r"a continuation of \d+ tokens from position 96 on takes"):
        tiny_trainer(Curriculum(Fixed(0.5)), limit_val_batches=0).fit(asking, datamodule=tiny_data(retrieval_share=0.0))
