"""The student is held to the teacher at every token of the context's first chunk, which nothing was evicted from."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress, KnormPress
from transformers import PreTrainedModel

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import EIT, LM, Chunks, FirstChunk, Mixed, SelectionObjective
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.objectives.disturbed_student import CONTEXT, RATIO, batch, student
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw
from tests.windowed_models import windowed_model

Build = Callable[..., PreTrainedModel]
WAYS = {
    "whole": {},
    "chunks": {"chunk_tokens": 10},
    "checkpointed": {"chunk_tokens": 10, "checkpoint": True},
    "drawn": {"press": EvictionAugPress([KnormPress(), KeyDiffPress()], score_all=True)},
}


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_equal_those_of_a_pass_over_the_chunk_alone(way: str, random_model: Build) -> None:
    own, data = student(random_model(), FirstChunk(), **WAYS[way]), batch()
    tokens = WAYS[way].get("chunk_tokens", CONTEXT)
    view, _ = own.view(data, RATIO, 0)
    terms = own.objective(view)
    assert terms.keys() == {"loss", "first_chunk/cross_entropy", "first_chunk/kl"}
    terms["loss"].backward()
    found = {name: p.grad.clone() for name, p in own.model.named_parameters() if p.grad is not None}

    own.model.zero_grad()
    ids = data["context_ids"][:, :tokens]
    alone = own.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    with torch.no_grad():
        teacher = own.teacher.network.get_decoder()(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    first: Any = view.first_chunk
    torch.testing.assert_close(first.hidden_NE, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.teacher_NE, teacher, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.labels_N, ids[:, 1:].flatten())
    expected = EIT()(replace(first, hidden_NE=alone))
    torch.testing.assert_close(terms["first_chunk/kl"], expected["kl"])
    expected["loss"].backward()
    for name, parameter in own.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_layers_that_no_press_cuts_are_read_as_usual() -> None:
    own, data = student(windowed_model("gemma3"), FirstChunk()), batch()
    view, _ = own.view(data, RATIO, 0)
    with torch.no_grad():
        hidden = own.model.get_decoder()(input_ids=data["context_ids"]).last_hidden_state
    first: Any = view.first_chunk
    torch.testing.assert_close(first.hidden_NE, hidden[:, :-1].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_the_chunks_after_it_stay_what_they_were(random_model: Build) -> None:
    alone, _ = student(random_model(), Chunks(), chunk_tokens=10).view(batch(), RATIO, 0)
    beside, _ = student(random_model(), Mixed([Chunks(), FirstChunk()]), chunk_tokens=10).view(batch(), RATIO, 0)
    assert alone.first_chunk is None and beside.chunks is not None and alone.chunks is not None
    assert torch.equal(alone.hidden_NE, beside.hidden_NE)
    assert torch.equal(alone.chunks.hidden_NE, beside.chunks.hidden_NE)
    assert torch.equal(alone.chunks.labels_N, beside.chunks.labels_N)


def test_it_trains_beside_the_other_objectives_with_lengths_that_differ(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    objective = Mixed([EIT(), SelectionObjective(), FirstChunk(EIT(kl_weight=100.0))], [1.0, 1.0, 0.01])
    module = EITModule(tiny_backbone(), RealEviction(KeyDiffPress()), objective, optimizer=adamw)
    trainer = tiny_trainer(Curriculum(Fixed(RATIO)), max_steps=2)
    trainer.fit(module, tiny_data(shortest_context=64, retrieval_share=0.0))
    assert {"train/first_chunk/kl", "train/kl", "train/selection/KeyDiff"} <= set(trainer.callback_metrics)


def test_what_cannot_answer_it_is_refused(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match=r"first_chunk objective .*, and KVDropout has no press"):
        EITModule(tiny_backbone(), KVDropout(), FirstChunk(LM()))
    with pytest.raises(ValueError, match=r"FirstChunk\.objective is SelectionObjective"):
        FirstChunk(SelectionObjective())
