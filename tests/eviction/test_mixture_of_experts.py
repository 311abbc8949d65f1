"""Mixtures of experts train under eviction: recomputed passes choose the same experts, adapters go where layers are."""

import pytest
import torch
from kvpress import KeyDiffPress

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.anchors import Anchors, AnchorTable
from sparsekv_pl.models.lora import Lora, inject_lora
from sparsekv_pl.objectives import EIT
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher
from tests.architecture_abilities import joined, taken_gradients, texts, with_adapter
from tests.architectures import architecture

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss"]


def real(checkpoint: bool) -> Eviction:
    return RealEviction(KeyDiffPress(), chunk_tokens=8, checkpoint=checkpoint)


def dropout(checkpoint: bool) -> Eviction:
    eviction = KVDropout(Anchors(sinks=1, recent=4), checkpoint=checkpoint)
    eviction.tokenizer = AnchorTable(torch.zeros(64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool))
    return eviction


@pytest.mark.parametrize("name", EXPERTS)
def test_checkpointed_steps_have_the_loss_and_gradients_of_others(name: str) -> None:
    """Teacher and student, two passes each; KV dropout refuses GPT-OSS's sinks (test_softmax_rule.py)."""
    for make in (real,) if name == "gpt_oss" else (real, dropout):
        losses, gradients = [], []
        for checkpoint in (False, True):
            adapted = with_adapter(architecture(name).train())
            student = Student(adapted, make(checkpoint), Teacher(adapted), EIT())
            loss = student.objective(student.view(texts(), 0.5, 0)[0])["loss"]
            loss.backward()
            losses.append(loss.detach())
            gradients.append(joined(taken_gradients(adapted)))
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
        assert gradients[0].norm() > 0


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_one_parameter_take_no_adapter_and_are_no_target(name: str) -> None:
    with pytest.raises(ValueError, match=r"lora.targets \['down_proj'\] are not in the decoder .*'q_proj'"):
        inject_lora(architecture(name), Lora(targets=("q_proj", "down_proj")))
