"""Keys that fade out: the formula against dense attention, the hard limit, gradients, evaluation, training."""

from typing import Any

import pytest
import torch
from kvpress import ScorerPress
from torch import Tensor

from sparsekv_pl.eviction.continuation import continued
from sparsekv_pl.eviction.prefill import full_cache, prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import EIT
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.nesting import learnable
from sparsekv_pl.presses.soft_threshold import SoftThresholdPress
from sparsekv_pl.presses.step_draws import draw, last
from sparsekv_pl.training.eit_module import EITModule
from tests.presses.soft_threshold_cases import (
    LENGTH,
    SINKS,
    WINDOW,
    ids,
    press_context_of,
    press_with,
    protected,
    received,
)
from tests.random_models import Build
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer

# --- settings ---


def test_only_a_learnable_threshold_is_a_parameter() -> None:
    assert learnable(press_with(threshold=0.5)) == {}
    assert [p.item() for p in learnable(press_with(threshold=0.5, learnable=True)).values()] == [0.5]


# --- the temperature ---


def at(press: SoftThresholdPress, step: int) -> float:
    press.draw(step)
    return press.temperature_now


def test_the_temperature_is_geometric_in_the_step() -> None:
    press = press_with(temperature=2.0, final_temperature=200.0, anneal_steps=4)
    assert [at(press, step) for step in (0, 1, 2, 4, 9)] == pytest.approx([2, 2 * 10**0.5, 20, 200, 200])
    assert [at(press_with(temperature=3.0), step) for step in (0, 1000)] == [3, 3]
    falling = press_with(temperature=8.0, final_temperature=2.0, anneal_steps=2)
    draw(EvictionAugPress([falling]), 1)  # inside another press too
    assert falling.temperature_now == pytest.approx(4)


def test_without_a_length_of_its_own_it_anneals_over_the_training(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    press = SoftThresholdPress(window_size=8, final_temperature=16.0)
    with pytest.raises(ValueError, match="anneal_steps is null outside a training"):
        at(press, 1)
    module = EITModule(tiny_backbone(), RealEviction(EvictionAugPress([press])), EIT())
    module.compression_ratio = 0.5
    tiny_trainer(max_steps=2).fit(module, tiny_data())
    assert at(press, 1) == pytest.approx(4) and at(press, 2) == pytest.approx(16)
    with pytest.raises(ValueError, match=r"anneal_steps follows trainer\.max_steps, which is -1: give either"):
        last(EvictionAugPress([press]), -1)


# --- the weights ---


@torch.no_grad()
def test_weights_are_the_sigmoid_of_attention_less_a_fixed_threshold(random_model: Build) -> None:
    model, press = random_model(), press_with(threshold=0.3, temperature=2.5)
    expected = received(model, ids())
    press_context = press_context_of(model, press)
    assert list(press_context.key_log_weights) == [0, 1]
    for layer, log_weights in press_context.key_log_weights.items():
        weights = (2.5 * (expected[layer] - 0.3)).sigmoid().masked_fill(protected(), 1)
        torch.testing.assert_close(log_weights.exp(), weights, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_a_threshold_the_budget_is_what_weighs_more_than_a_half(random_model: Build) -> None:
    model = random_model()
    for ratio in (0.05, 0.3, 0.5, 0.7):
        for log_weights in press_context_of(model, press_with(ratio)).key_log_weights.values():
            assert ((log_weights.exp() > 0.5).sum(-1) == int(LENGTH * (1 - ratio))).all()
            ordered = log_weights.exp()[..., ~protected()].sort(descending=True).values
            kept = int(LENGTH * (1 - ratio)) - SINKS - WINDOW
            logits = ordered.logit()
            torch.testing.assert_close(logits[..., kept - 1], -logits[..., kept], atol=1e-5, rtol=1e-4)  # midway


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.75, 0.9])
def test_where_protected_keys_fill_the_budget_the_rest_is_dropped_outright(random_model: Build, ratio: float) -> None:
    budget = int(LENGTH * (1 - ratio))  # 6: sinks and window just fit; 2: the sinks alone
    expected = protected() & ((torch.arange(LENGTH) < SINKS) | torch.tensor(budget > SINKS))
    for log_weights in press_context_of(random_model(), press_with(ratio)).key_log_weights.values():
        assert torch.equal(log_weights.exp(), expected.float().expand_as(log_weights))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2}])
def test_ratio_0_changes_nothing(random_model: Build, settings: dict[str, Any]) -> None:
    model = random_model()
    evict = RealEviction(press_with(**settings))
    for training in (True, False):
        evicted = evict(model.train(training), ids(), ids(length=5), compression_ratio=0.0, step=0)
        assert torch.equal(evicted.hidden, full_cache(model, ids(), ids(length=5)))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2}])
def test_rows_are_independent(random_model: Build, settings: dict[str, Any]) -> None:
    model, press = random_model(), press_with(0.6, **settings)
    together = press_context_of(model, press, ids(3)).key_log_weights
    for row in range(3):
        for layer, log_weights in press_context_of(model, press, ids(3)[row : row + 1]).key_log_weights.items():
            torch.testing.assert_close(log_weights[0], together[layer][row], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_in_training_it_needs_one_chunk(random_model: Build) -> None:
    with pytest.raises(ValueError, match="one chunk"):
        prefill(random_model().train(), ids(), press_with(), chunk_tokens=12)


# --- the hard limit ---


class Dropping(ScorerPress):
    """Really drops, by the scores of another press."""

    def __init__(self, soft: SoftThresholdPress) -> None:
        super().__init__(soft.compression_ratio)
        self.scoring = soft.score

    def score(self, *args: Any) -> Tensor:
        return self.scoring(*args)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 0.75, 0.8, 0.9])
def test_the_hard_limit_is_dropping(random_model: Build, ratio: float) -> None:
    """Values and gradients, also where the protected keys do not all fit (0.8, 0.9)."""
    model = random_model().double().train()
    soft = press_with(ratio, temperature=1e12)
    found = []
    for press in (soft, Dropping(soft)):
        model.zero_grad()
        hidden = continued(model, prefill(model, ids(), press), ids(length=6, seed=1))
        hidden.square().mean().backward()
        found.append((hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-10, rtol=1e-8)
    assert found[0][1]["model.layers.0.self_attn.v_proj.weight"].any()


def test_soft_weights_are_neither_dropping_nor_keeping(random_model: Build) -> None:
    model = random_model().train()
    soft, more = press_with(0.5), ids(length=6, seed=1)
    hidden = continued(model, prefill(model, ids(), soft), more)
    for other in (continued(model, prefill(model, ids(), Dropping(soft)), more), full_cache(model, ids(), more)):
        assert (hidden - other).abs().max() > 1e-3
