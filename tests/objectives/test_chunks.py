"""A context's chunks after the first carry loss: each is a continuation of the cache that earlier chunks left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress, KnormPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import EIT, LM, Chunks, Mixed, SelectionObjective
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.objectives.disturbed_student import CONTEXT, RATIO, batch, student
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw

Build = Callable[..., PreTrainedModel]
CHUNK = 10


@torch.no_grad()
def by_hand(model: Any, context: Tensor) -> Tensor:
    """Hidden states (B, 20, E) of chunks 2 and 3: read, evict the smallest share of scores by norm, read on."""
    press, hidden, cache = KnormPress(), [], DynamicCache()
    for start in range(0, CONTEXT, CHUNK):
        chunk = context[:, start : start + CHUNK]
        hidden.append(continue_from(model, chunk, cache, start, decoding=True))
        kept = int((start + CHUNK) * (1 - RATIO))
        for layer in cache.layers:
            scores = press.score(None, None, layer.keys, layer.values, None, {})  # type: ignore[arg-type]
            index = scores.topk(kept, dim=-1).indices.sort(-1).values.unsqueeze(-1).expand(-1, -1, -1, 8)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    return torch.cat(hidden[1:], dim=1)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_every_chunk_after_the_first_is_read_after_the_eviction_of_those_before(
    checkpoint: bool, random_model: Build
) -> None:
    own, data = student(random_model(), Chunks(), chunk_tokens=CHUNK, checkpoint=checkpoint), batch()
    view, _ = own.view(data, RATIO, 0)
    assert view.chunks is not None and view.chunks.teacher_NE is not None
    hidden = by_hand(own.model, data["context_ids"])[:, :-1]
    torch.testing.assert_close(view.chunks.hidden_NE, hidden.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(view.chunks.labels_N, data["context_ids"][:, CHUNK + 1 :].flatten())
    with torch.no_grad():
        whole = torch.cat([data["context_ids"], data["continuation_ids"]], 1)
        full = own.teacher.network.get_decoder()(whole).last_hidden_state
    torch.testing.assert_close(view.chunks.teacher_NE, full[:, CHUNK : CONTEXT - 1].flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(view.teacher_NE, full[:, CONTEXT:-1].flatten(0, 1), rtol=1e-4, atol=1e-5)
    expected = EIT()(view.chunks)
    found = own.objective(view)
    assert found.keys() == {"loss", "chunks/cross_entropy", "chunks/kl"}
    assert found["loss"] == expected["loss"] and found["chunks/kl"] == expected["kl"] > 0


def test_gradients_pass_through_what_earlier_chunks_left_also_when_chunks_run_again(random_model: Build) -> None:
    gradients = []
    for checkpoint in (False, True):
        own = student(
            random_model(), Mixed([LM(), Chunks(LM())], [1.0, 0.5]), chunk_tokens=CHUNK, checkpoint=checkpoint
        )
        view, _ = own.view(batch(), RATIO, 0)
        own.objective(view)["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in own.model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)
    alone = student(random_model(), LM(), chunk_tokens=CHUNK)
    view, _ = alone.view(batch(), RATIO, 0)
    assert view.chunks is None
    alone.objective(view)["loss"].backward()
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(alone.model.get_parameter(name).grad, plain[name], atol=1e-3)


def test_it_trains_beside_the_continuations_objectives_with_lengths_that_differ(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    objective = Mixed([EIT(), SelectionObjective(), Chunks()], [1.0, 1.0, 0.3])
    module = EITModule(tiny_backbone(), RealEviction(KeyDiffPress(), 40), objective, optimizer=adamw)
    trainer = tiny_trainer(Curriculum(Fixed(RATIO)), max_steps=2)
    trainer.fit(module, tiny_data(shortest_context=64, retrieval_share=0.0))
    logs = {name for name in trainer.callback_metrics if name.startswith("train/")}
    assert {"train/chunks/kl", "train/chunks/cross_entropy", "train/kl", "train/selection/KeyDiff"} <= logs


def test_what_has_no_chunks_is_refused(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(KnormPress(), 96), Chunks())
    with pytest.raises(ValueError, match="a context of 96 tokens is one chunk"):
        tiny_trainer(Curriculum(Fixed(RATIO))).fit(module, tiny_data())
    with pytest.raises(ValueError, match=r"chunks objective supervises .*, and KVDropout has no press"):
        EITModule(tiny_backbone(), KVDropout(), Chunks())
    with pytest.raises(ValueError, match=r"Chunks\.objective is SelectionObjective"):
        Chunks(SelectionObjective())
