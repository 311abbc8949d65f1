"""SoftThresholdPress: gradients against finite differences, what evaluation keeps, wrappers, and training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import ComposedPress, KnormPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.continuation import continued
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives import EIT
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.presses.nesting import learnable, scorers_in
from sparsekv_pl.presses.soft_threshold import SoftThresholdPress
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.training.eit_module import EITModule
from tests.presses.soft_threshold_cases import (
    LENGTH,
    SINKS,
    ids,
    press_with,
    protected,
    received,
)
from tests.random_models import Build
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw

# --- gradients ---


def loss_of(model: PreTrainedModel, press: SoftThresholdPress) -> Tensor:
    hidden = continued(model, prefill(model, ids(), press), ids(length=6, seed=1))
    pick = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(5))
    return (hidden * pick).sum()


def exact_norm(norm: Any, hidden: Tensor) -> Tensor:
    """As transformers' RMSNorm, which computes in float32: too coarse for finite differences."""
    return norm.weight * hidden * (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def test_gradients_of_threshold_queries_keys_and_values_are_those_of_finite_differences(
    random_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press = random_model().double().train(), press_with(threshold=0.4, learnable=True, temperature=3.0)
    monkeypatch.setattr(type(model.model.norm), "forward", exact_norm)
    press.learned_threshold.data = press.learned_threshold.data.double()
    attention = model.model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, press.learned_threshold]
    gradients = torch.autograd.grad(loss_of(model, press), weights)
    generator = torch.Generator().manual_seed(6)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction, eps = torch.randn(weight.shape, dtype=torch.float64, generator=generator), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * eps * direction
                values.append(float(loss_of(model, press)))
                weight -= sign * eps * direction
        numeric = (values[0] - values[1]) / (2 * eps)
        assert abs(numeric) > 1e-3
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-5)


def test_the_context_s_last_queries_learn_to_look_at_what_the_continuation_needs(random_model: Build) -> None:
    """Layer 1's q_proj of the context: hidden states of the continuation alone do not depend on it when dropping."""
    model = random_model().double().train()
    query = model.model.layers[1].self_attn.q_proj
    norms = []
    for temperature in (2.0, 1e12):
        prefilled = prefill(model, ids(), press_with(temperature=temperature))
        cut = query.weight.detach()
        with torch.no_grad():  # another tensor for the continuation, so that only the window's queries have gradients
            held = query.weight
        query.weight = torch.nn.Parameter(cut.clone())
        hidden = continued(model, prefilled, ids(length=6, seed=1))
        query.weight = held
        norms.append(float(torch.autograd.grad(hidden.square().sum(), held, allow_unused=True)[0].abs().max()))
    assert norms[0] > 1e-4
    assert norms[1] == 0


# --- evaluation ---


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.75, 0.8, 0.95])
@pytest.mark.parametrize("settings", [{}, {"threshold": 5.0, "learnable": True}])
def test_evaluation_keeps_exactly_the_budget_by_attention(
    random_model: Build, ratio: float, settings: dict[str, Any]
) -> None:
    model = random_model()
    expected = received(model, ids())
    prefilled = prefill(model, ids(), press_with(ratio, **settings), request=Request(contexts=True))
    budget = max(1, int(LENGTH * (1 - ratio)))
    index = torch.arange(LENGTH)
    first = torch.where(index < SINKS, 100 + LENGTH - index, torch.where(protected(), 100 + index - LENGTH, 0))
    for layer in range(2):
        assert prefilled.cache.get_seq_length(layer) == budget
        best = expected[layer].masked_fill(protected(), 0) + first
        assert torch.equal(prefilled.positions[layer], best.topk(budget).indices.sort().values)
    assert prefilled.press_context is not None and not prefilled.press_context.key_log_weights


@torch.no_grad()
def test_outside_our_prefill_it_evicts_in_training_too(random_model: Build) -> None:
    model, cache = random_model().train(), DynamicCache()
    with press_with(0.5)(model):
        model.model(ids(), past_key_values=cache)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [12, 12]


# --- training ---


def test_a_selection_loss_trains_its_scores(random_model: Build) -> None:
    model, press = random_model().train(), press_with(0.5)
    assert scorers_in(press) == [press] and traits_of(press).trainable
    selections = prefill(model, ids(), press, request=Request(scores=True)).selections
    mass = torch.rand(2, 2, LENGTH, generator=torch.Generator().manual_seed(3))
    loss = SelectionLoss(SINKS)([(selection, mass) for selection in selections])["SoftThreshold"]
    share = selections[0].scores.masked_fill(protected(), 0)
    share = share / share.sum(-1, keepdim=True)
    target = mass.masked_fill(protected(), 0)
    terms = -(target * share.clamp(min=1e-9).log()).sum(-1)  # each head by the mass it is measured on
    one = SelectionLoss(SINKS)([(selections[0], mass)])["SoftThreshold"]
    torch.testing.assert_close(one, (terms / target.sum()).sum())
    gradient = torch.autograd.grad(loss, model.model.layers[0].self_attn.q_proj.weight)[0]
    assert gradient.isfinite().all() and gradient.any()


def test_training_moves_a_learnable_threshold_and_saves_it(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def module() -> EITModule:
        press = SoftThresholdPress(window_size=8, threshold=0.5, learnable=True)
        made = EITModule(tiny_backbone(), RealEviction(press), EIT(), optimizer=adamw)
        made.compression_ratio = 0.5
        return made

    trains, trainer = module(), tiny_trainer(max_steps=2)
    trainer.fit(trains, tiny_data())
    (name,) = (name for name, _ in trains.named_parameters() if "threshold" in name)
    assert trains.press is not None
    (threshold,) = learnable(trains.press).values()
    assert 1e-3 < abs(threshold.item() - 0.5) < 0.05  # two steps of AdamW at 1e-2
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved[name], threshold)
    resumed = module()
    resumed.load_state_dict(saved, strict=False)
    assert resumed.press is not None
    assert torch.equal(next(iter(learnable(resumed.press).values())), threshold)


def test_keys_that_another_press_removes_after_they_were_weighed_are_an_error(random_model: Build) -> None:
    press = ComposedPress([SoftThresholdPress(0.5, window_size=8), KnormPress(0.5)])
    ids = torch.randint(0, 64, (1, 96), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"fades out 96 keys, of which another press left 48"):
        prefill(random_model().train(), ids, press)
