"""Gradients that stay in the layer equal those of an explicitly detached, layer by layer computation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KeyDiffPress, SnapKVPress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.continuation import continued
from sparsekv_pl.eviction.interface import Evicted
from sparsekv_pl.eviction.local_gradients import LocalGradients
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.presses import EvictionAugPress

Build = Callable[..., PreTrainedModel]
Gradients = dict[str, Tensor]
CONTEXT, CONTINUATION, RATIO, STEP = 32, 8, 0.5, 3
LAYERS = 3


def ids() -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, 64, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    return rows[:, :CONTEXT], rows[:, CONTEXT:]


def mass(layer: int) -> Tensor:
    return torch.rand(2, 2, CONTEXT, generator=torch.Generator().manual_seed(layer)).softmax(-1)


def press() -> BasePress:
    return EvictionAugPress([KeyDiffPress(), SnapKVPress(window_size=4), ExpectedAttentionPress()], score_all=True)


def model_of(random_model: Build) -> Any:
    model = random_model(num_hidden_layers=LAYERS)
    model.get_input_embeddings().requires_grad_(False)  # an adapter trains projections alone
    return model


def evicted(model: Any, eviction: RealEviction, step: int = STEP) -> Evicted:
    return eviction(model, *ids(), compression_ratio=RATIO, step=step, request=Request(scores=True))


def gradients(model: Any, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses(found: Evicted) -> tuple[Tensor, Tensor]:
    """The selection loss of all presses and layers, and a loss on the continuation."""
    aligned = SelectionLoss()([(selection, mass(selection.layer)) for selection in found.selections])
    return torch.stack(list(aligned.values())).sum(), found.hidden.square().mean()


def layer_by_layer(model: Any, eviction: RealEviction) -> Gradients:
    """The slow way: one backward per layer for its own weights, whose input does not depend on them; then the cache
    without its history."""
    wanted: Gradients = {}
    for layer in range(LAYERS):
        found = evicted(model, eviction)
        found.selections = [
            one if one.layer == layer else replace(one, scores=one.scores.detach().requires_grad_())
            for one in found.selections
        ]
        own = gradients(model, losses(found)[0])
        wanted |= {name: value for name, value in own.items() if f"layers.{layer}." in name}
    filling = ChunkedPrefill(model, eviction.press, CONTEXT, eviction.chunk_tokens)
    with torch.no_grad():
        prefilled = filling.run(ids()[0])
    for name, value in gradients(model, continued(model, prefilled, ids()[1]).square().mean()).items():
        wanted[name] = wanted.get(name, 0) + value
    return wanted


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_they_equal_those_of_layers_taken_one_by_one(checkpoint: bool, random_model: Build) -> None:
    model, eviction = model_of(random_model), RealEviction(press(), checkpoint=checkpoint)
    wanted = layer_by_layer(model, eviction)
    found = evicted(model, replace(eviction, local_gradients=LocalGradients()))
    local = gradients(model, sum(losses(found), torch.zeros(())))
    through = gradients(model, sum(losses(evicted(model, eviction)), torch.zeros(())))
    assert wanted.keys() == local.keys() == through.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(local[name], value, rtol=1e-4, atol=1e-6)
    first = [name for name in wanted if "layers.0." in name and "proj" in name]
    assert all(not torch.allclose(local[name], through[name], rtol=1e-2, atol=1e-4) for name in first)


def test_chunks_keep_each_layers_own_history(random_model: Build) -> None:
    """In several chunks a score also depends on keys of earlier chunks, of the same layer: nothing else is trained."""
    model, eviction = model_of(random_model), RealEviction(KeyDiffPress(), 12, local_gradients=LocalGradients())
    found = evicted(model, eviction)
    for layer in range(LAYERS):
        own = [one for one in found.selections if one.layer == layer]
        loss = SelectionLoss()([(one, mass(one.layer)) for one in own])["KeyDiff"]
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        parts = torch.autograd.grad(
            loss, [model.get_parameter(name) for name in names], retain_graph=True, allow_unused=True
        )
        trained = {name for name, part in zip(names, parts, strict=True) if part is not None}
        assert trained and all(f"layers.{layer}." in name for name in trained)


def test_what_is_computed_does_not_change_and_through_steps_are_ordinary(random_model: Build) -> None:
    model, eviction = model_of(random_model), RealEviction(press())
    mixed = replace(eviction, local_gradients=LocalGradients(through_every=3))
    for step, same in ((3, True), (4, False), (5, False), (6, True)):
        plain, other = evicted(model, eviction, step), evicted(model, mixed, step)
        assert torch.equal(plain.hidden, other.hidden) and plain.kept_share == other.kept_share
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(plain.selections, other.selections, strict=True))
        ordinary, found = (gradients(model, losses(one)[1]) for one in (plain, other))
        assert all(torch.equal(ordinary[name], found[name]) for name in ordinary) == same


@pytest.mark.parametrize(
    ("settings", "local"),
    [
        ({}, {(0, 1), (1, 1), (2, 9)}),
        ({"through_every": 2}, {(1, 1)}),
        ({"above_tokens": 4}, {(2, 9)}),
        ({"above_tokens": 4, "through_every": 2}, set()),
    ],
)
def test_steps_and_lengths_choose(settings: dict[str, int], local: set[tuple[int, int]]) -> None:
    rule = LocalGradients(**settings)
    assert {given for given in ((0, 1), (1, 1), (2, 9)) if rule.at(*given)} == local


@pytest.mark.parametrize(("name", "value"), [("through_every", 1), ("through_every", 0), ("above_tokens", -1)])
def test_bad_settings_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"local_gradients.{name}={value}"):
        LocalGradients(**{name: value})
