"""The student is held to the teacher with the whole cache too, beside the eviction."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress, KeyRerotationPress, KnormPress
from transformers import PreTrainedModel

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.local_gradients import LocalGradients
from sparsekv_pl.eviction.prefill import full_cache
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import EIT, LM, FullCache, Mixed, SelectionObjective
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.objectives.disturbed_student import CONTEXT, RATIO, batch, student
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw
from tests.windowed_models import windowed_model

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    "press",
    [KnormPress(), KeyRerotationPress(KnormPress()), EvictionAugPress([KnormPress(), KeyDiffPress()], score_all=True)],
    ids=["knorm", "re-rotated", "drawn"],
)
def test_values_and_gradients_equal_those_of_a_pass_without_a_press(press: Any, random_model: Build) -> None:
    own, data = student(random_model(), FullCache(), press), batch()
    view, _ = own.view(data, RATIO, 0)
    assert view.full_cache is not None and not torch.allclose(view.full_cache.hidden_NE, view.hidden_NE, atol=1e-3)
    terms = own.objective(view)
    terms["loss"].backward()
    found = {name: p.grad.clone() for name, p in own.model.named_parameters() if p.grad is not None}

    own.model.zero_grad()
    whole = full_cache(own.model, data["context_ids"], data["continuation_ids"])[:, :-1].flatten(0, 1)
    torch.testing.assert_close(view.full_cache.hidden_NE, whole, rtol=1e-4, atol=1e-5)
    expected = EIT()(replace(view.full_cache, hidden_NE=whole))
    torch.testing.assert_close(terms["full_cache/kl"], expected["kl"])
    expected["loss"].backward()
    for name, parameter in own.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "lfm2"])
def test_layers_that_no_press_cuts_are_part_of_the_whole_cache(kind: str) -> None:
    own, data = student(windowed_model(kind), FullCache()), batch()
    view, _ = own.view(data, RATIO, 0)
    assert view.full_cache is not None
    with torch.no_grad():
        ids = torch.cat([data["context_ids"], data["continuation_ids"]], 1)
        hidden = own.model.get_decoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(view.full_cache.hidden_NE, hidden[:, CONTEXT:-1].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_the_pass_under_eviction_stays_what_it_was(random_model: Build) -> None:
    alone, _ = student(random_model(), EIT()).view(batch(), RATIO, 0)
    beside, _ = student(random_model(), Mixed([EIT(), FullCache()])).view(batch(), RATIO, 0)
    assert torch.equal(alone.hidden_NE, beside.hidden_NE) and alone.full_cache is None


def test_gradients_that_stay_in_the_layer_do_not_reach_the_context(random_model: Build) -> None:
    own = student(random_model(), FullCache(LM()), local_gradients=LocalGradients())
    view, _ = own.view(batch(), RATIO, 1)
    own.objective(view)["loss"].backward()
    embedded = own.model.get_input_embeddings().weight.grad
    only = [token for token in range(64) if not (batch()["continuation_ids"] == token).any()]
    assert embedded is None or not embedded[only].any()


def test_it_trains_beside_the_other_objectives_with_lengths_that_differ(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    objective = Mixed([EIT(), SelectionObjective(), FullCache()], [1.0, 1.0, 0.3])
    module = EITModule(tiny_backbone(), RealEviction(KeyDiffPress()), objective, optimizer=adamw)
    trainer = tiny_trainer(Curriculum(Fixed(RATIO)), max_steps=2)
    trainer.fit(module, tiny_data(shortest_context=64, retrieval_share=0.0))
    assert {"train/full_cache/kl", "train/kl", "train/selection/KeyDiff"} <= set(trainer.callback_metrics)


def test_a_context_without_a_whole_cache_is_refused(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    for eviction in (RealEviction(KnormPress(), 40), RealEviction(KnormPress(), checkpoint=True)):
        module = EITModule(tiny_backbone(), eviction, FullCache())
        with pytest.raises(ValueError, match="full_cache objective continues the cache as it was before"):
            tiny_trainer(Curriculum(Fixed(RATIO))).fit(module, tiny_data())
    with pytest.raises(ValueError, match=r"full_cache objective .*, and KVDropout has no press"):
        EITModule(tiny_backbone(), KVDropout(), FullCache())
    with pytest.raises(ValueError, match=r"FullCache\.objective is SelectionObjective"):
        FullCache(SelectionObjective())
