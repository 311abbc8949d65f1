"""The training module in a real Trainer, on tiny models and on contexts longer than their positions."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KeyRerotationPress, KnormPress, SnapKVPress, StreamingLLMPress
from torch import Tensor

from callbacks.curriculum import Curriculum
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.objectives import EIT, LM, Mixed, Objective, Reconstruction, SelectionObjective, StudentView
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Fixed, Linear, Spread
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained


def snapkv() -> RealEviction:
    return RealEviction(SnapKVPress(window_size=8))


def tokens(rows: int = 2) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 1024, (rows, 48), generator=torch.Generator().manual_seed(3))
    return ids[:, :32], ids[:, 32:]


# --- the teacher ---


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_teachers_logits_are_the_base_models_whatever_the_adapter_learnt(
    kind: str, tiny_backbone: MakeBackbone
) -> None:
    base, _ = tiny_backbone(kind, lora=None).load()
    module = EITModule(tiny_backbone(kind), snapkv())
    for parameter in trained(module):
        torch.nn.init.normal_(module.get_parameter(parameter), std=0.3)
    context, continuation = tokens()
    with torch.no_grad():
        expected = base(torch.cat([context, continuation], 1)).logits[:, 32:]
        changed = causal_lm(module.model)(torch.cat([context, continuation], 1)).logits[:, 32:]
    hidden = module.teacher(context, continuation)
    assert torch.equal(hidden @ module.student.head.weight.T, expected)
    assert not torch.allclose(changed, expected, atol=1e-2)
    assert module.teacher.head is None


def test_the_teacher_has_no_dropout_and_the_student_keeps_its_own(
    tiny_backbone: MakeBackbone, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    copytree(tiny_models["llama"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attention_dropout": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = EITModule(tiny_backbone(pretrained=str(tmp_path)), snapkv())
    expected = module.teacher(*tokens())
    module.train()
    module.get_submodule("model.base_model.model.model.norm").eval()
    modes = {name: part.training for name, part in module.named_modules()}
    assert torch.equal(module.teacher(*tokens()), expected)
    assert {name: part.training for name, part in module.named_modules()} == modes
    student = [causal_lm(module.model).model(tokens()[0]).last_hidden_state for _ in range(2)]
    assert not torch.equal(*student)


def test_the_teacher_of_full_fine_tuning_does_not_drift(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(lora=None), snapkv(), optimizer=adamw)
    context, continuation = tokens()
    head = module.teacher.head
    assert head is not None
    before = head.logits(module.teacher(context, continuation))
    student = module.student.head.weight.detach().clone()
    tiny_trainer(Curriculum(Fixed(0.5)), max_steps=2).fit(module, tiny_data())
    assert not torch.equal(module.student.head.weight, student)
    assert torch.equal(head.logits(module.teacher(context, continuation)), before)
    assert not any(name.startswith("teacher") for name, _ in module.named_parameters())


def test_at_the_start_and_without_eviction_student_and_teacher_agree(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    """LoRA starts as zero, so at compression 0 the KL term is 0."""
    trainer = tiny_trainer(Curriculum(Fixed(0.0)), max_steps=1)
    trainer.fit(EITModule(tiny_backbone(), snapkv()), tiny_data())
    assert trainer.callback_metrics["train/kl"] == pytest.approx(0, abs=1e-5)
    assert trainer.callback_metrics["train/kept_share"] == 1


# --- objectives and evictions ---


def test_the_mixed_loss_is_the_weighted_sum_of_its_members() -> None:
    generator = torch.Generator().manual_seed(0)
    view = StudentView(
        hidden_NE=torch.randn(5, 8, generator=generator),
        labels_N=torch.tensor([1, 2, 3, 4, 5]),
        head=torch.randn(11, 8, generator=generator),
        teacher_NE=torch.randn(5, 8, generator=generator),
    )
    parts = [LM()(view)["loss"], EIT(kl_weight=2.0)(view)["loss"]]
    assert Mixed([LM(), EIT(kl_weight=2.0)], [0.5, 3.0])(view)["loss"] == pytest.approx(0.5 * parts[0] + 3 * parts[1])
    assert EIT(kl_weight=0.0)(view)["loss"] == pytest.approx(float(parts[0]), rel=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: EIT(kl_weight=-1.0), "kl_weight=-1.0"),
        (lambda: EIT(temperature=0.0), "temperature=0.0"),
        (lambda: Mixed([]), r"objectives is \[\]"),
        (lambda: Mixed([LM()], [1.0, 2.0]), r"weights=\[1.0, 2.0\]"),
    ],
)
def test_objectives_name_a_bad_setting(bad: Callable[[], Objective], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


def test_a_step_that_draws_a_press_with_nothing_to_train_trains_nothing(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    press = EvictionAugPress([StreamingLLMPress(), SnapKVPress(window_size=8)], weights=[1.0, 0.0])
    module = EITModule(tiny_backbone(), RealEviction(press), SelectionObjective(), optimizer=adamw)
    trainer = tiny_trainer(Curriculum(Linear(0.5, 0.5)), max_steps=1)
    trainer.fit(module, tiny_data())
    assert trainer.callback_metrics["train/loss"] == 0


# --- validation ---


def test_validation_logs_perplexity_full_and_evicted_at_its_own_ratio(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), snapkv(), validation_compression_ratio=0.0)
    trainer = tiny_trainer(limit_val_batches=1.0)
    module.compression_ratio = 0.9
    first = trainer.validate(module, tiny_data(), verbose=False)[0]
    assert first["val/perplexity_full"] == pytest.approx(first["val/perplexity_evicted"], rel=1e-5)
    module.validation_compression_ratio = 0.8
    second = trainer.validate(module, tiny_data(), verbose=False)[0]
    assert second["val/perplexity_full"] == first["val/perplexity_full"]
    assert second["val/perplexity_evicted"] != pytest.approx(first["val/perplexity_evicted"], rel=1e-4)


@pytest.mark.parametrize("press", [SnapKVPress(0.3, window_size=8), EvictionAugPress([KnormPress(0.3)])])
def test_a_ratio_that_is_written_in_a_press_and_overridden_is_warned_of(
    press: BasePress, tiny_backbone: MakeBackbone, caplog: pytest.LogCaptureFixture
) -> None:
    EITModule(tiny_backbone(), snapkv(), validation_eviction=RealEviction(KnormPress()))
    Setting(SnapKVPress(), [0.5])
    assert not caplog.records
    EITModule(tiny_backbone(), RealEviction(press))
    EITModule(tiny_backbone(), snapkv(), validation_eviction=RealEviction(press))
    Setting(press, [0.5])
    sources = ("the Curriculum", "validation_compression_ratio", "compression_ratios")
    for record, sets in zip(caplog.records, sources, strict=True):
        assert re.fullmatch(rf".*compression_ratio=0.3 is ignored: {sets} sets the ratio", record.getMessage())


# --- accumulation ---


def test_two_accumulated_batches_train_as_one_of_twice_the_size(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    def run(batch_size: int, accumulate: int) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        module = EITModule(tiny_backbone(), snapkv(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        curriculum = Curriculum(Spread(Linear(0.3, 0.6, steps=2)))
        trainer = tiny_trainer(curriculum, max_steps=2, accumulate_grad_batches=accumulate)
        trainer.fit(module, tiny_data(batch_size=batch_size, retrieval_share=0.0))
        return trained(module), trainer.global_step

    (accumulated, steps), (whole, same_steps) = run(1, 2), run(2, 1)
    assert steps == same_steps == 2
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-3, atol=1e-5)
    assert any(value.abs().max() > 1e-3 for name, value in whole.items() if "lora_B" in name)


# --- settings that are refused ---


def test_a_context_shorter_than_the_presss_window_stops_before_training(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(SnapKVPress(window_size=96)))
    with pytest.raises(ValueError, match=r"SnapKV looks at a window of 96 tokens .* chunks of 96"):
        tiny_trainer().fit(module, tiny_data())
    module = EITModule(tiny_backbone(), KVDropout(Anchors(recent=96)))
    with pytest.raises(ValueError, match="96"):
        tiny_trainer().fit(module, tiny_data())
    assert module.global_step == 0


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_a_compression_outside_0_to_1_is_refused(ratio: float, tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match=f"{ratio}"):
        EITModule(tiny_backbone(), snapkv(), validation_compression_ratio=ratio)


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
