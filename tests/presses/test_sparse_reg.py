"""Sparse attention as a loss: against dense attention's entropy and mass, with every kind of press, in training."""

from typing import Any

import pytest
import torch
from kvpress import ComposedPress, KnormPress, SnapKVPress
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.presses.nesting import press_name, presses_in, scorers_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.traits import traits_of
from tests.presses.sparse_reg_cases import KINDS, LENGTH, SINKS, WINDOW, Build, attentions_of, ids, losses, press_with


def reference(attention: Tensor, kind: str, rows: range) -> Tensor:
    """Compute a term for every row of attention (B, H, L, L)."""
    terms = []
    for at in rows:
        row = attention[:, :, at, : at + 1]
        if kind == "entropy":
            terms.append(-(row * row.log()).sum(-1))
        else:
            terms.append(row[..., SINKS : max(SINKS, at + 1 - WINDOW)].sum(-1))
    return torch.stack(terms).mean()


# --- settings ---


def test_a_layer_that_the_model_lacks_is_named(random_model: Build) -> None:
    with pytest.raises(ValueError, match=r"layers=\[0, 2\], but this model has layers 0 to 1"):
        losses(random_model(), press_with(layers=[0, 2]))


def test_the_inner_press_is_found_and_set() -> None:
    inner = SnapKVPress(0.3, window_size=9)
    press = press_with(inner)
    assert list(presses_in(press)) == [press, inner]
    assert scorers_in(press) == [inner]
    assert press_name(press) == "SparseReg(SnapKV)"
    assert traits_of(press).window == 9
    assert press.compression_ratio == 0.3
    set_compression_ratio(press, 0.6)
    assert press.compression_ratio == inner.compression_ratio == 0.6
    with pytest.raises(ValueError, match="Composed"):
        set_compression_ratio(press_with(ComposedPress([inner])), 0.5)


def test_without_an_inner_press_nothing_is_ever_evicted(random_model: Build) -> None:
    press = press_with()
    set_compression_ratio(press, 0.5)
    assert press.compression_ratio == 0
    assert traits_of(press).only_trains and not traits_of(press_with(KnormPress())).only_trains
    assert prefill(random_model(), ids(), press).cache.get_seq_length() == LENGTH


# --- what it measures ---


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_dense_attention(random_model: Build, kind: str) -> None:
    model = random_model()
    found = losses(model, press_with(SnapKVPress(0.5, window_size=WINDOW), kind=kind, weight=1.0))
    assert list(found) == [kind]
    expected = [reference(attention, kind, range(LENGTH - WINDOW, LENGTH)) for attention in attentions_of(model)]
    assert len(found[kind]) == len(expected) == 2
    for term, value in zip(found[kind], expected, strict=True):
        torch.testing.assert_close(term, value, atol=1e-5, rtol=1e-5)
    projections = [getattr(model.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    ours, dense = (torch.autograd.grad(torch.stack(terms).sum(), projections) for terms in (found[kind], expected))
    assert all(gradient.any() for gradient in ours)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_weight_and_layers(random_model: Build) -> None:
    model = random_model()
    whole = losses(model, press_with(weight=1.0))["entropy"]
    assert losses(model, press_with(weight=0.25, layers=[1]))["entropy"] == [0.25 * whole[1]]
    evict = RealEviction(press_with(KnormPress(), weight=2.0))
    evicted = evict(model.train(), ids(), ids(length=5), compression_ratio=0.5, step=0)
    torch.testing.assert_close(evicted.losses, {"entropy": 2 * torch.stack(whole).mean()})
    assert evicted.kept_share == 0.5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_has_its_rows(random_model: Build, kind: str) -> None:
    model = random_model()
    found = losses(model, press_with(kind=kind, weight=1.0), chunk_tokens=8)[kind]
    attentions = attentions_of(model)
    expected = [
        reference(attentions[layer], kind, range(stop - WINDOW, stop)) for stop in (8, 16, 24) for layer in (0, 1)
    ]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [(0, 9), (9, 0), (4, 5), (0, 21)])
def test_a_padded_row_counts_as_it_would_alone(random_model: Build, kind: str, left: int, right: int) -> None:
    model, press, calls = random_model(), press_with(kind=kind), []
    cache = DynamicCache()

    def loss(module: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        keys = cache.layers[module.layer_idx].keys
        assert keys is not None
        calls.append(press.loss(module, kwargs["hidden_states"], keys, kwargs))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(loss, with_kwargs=True)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, LENGTH - right :] = 0
    model.model(ids(), attention_mask=mask, past_key_values=cache)
    for row in (slice(0, 1), slice(1, 2)):
        cache = DynamicCache()
        model.model(ids()[row, mask[row][0].bool()], past_key_values=cache)
    for layer in range(2):
        both = (calls[2 + layer] + calls[4 + layer]) / 2
        torch.testing.assert_close(calls[layer], both, atol=1e-5, rtol=1e-4)


def test_attention_on_one_key_has_an_entropy_of_0_and_a_finite_gradient(random_model: Build) -> None:
    model = random_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1e4)
            if hasattr(layer.self_attn, "q_norm"):
                layer.self_attn.q_norm.weight.mul_(1e4)
    terms = losses(model, press_with(weight=1.0))["entropy"]
    assert all(0 <= term < 0.05 for term in terms)
    torch.stack(terms).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_bfloat16(random_model: Build) -> None:
    exact = losses(random_model(), press_with(weight=1.0))["entropy"]
    model = random_model().bfloat16()
    for kind in KINDS:
        terms = losses(model, press_with(kind=kind, weight=1.0))[kind]
        assert terms[0].dtype == torch.float32
        if kind == "entropy":
            torch.testing.assert_close(terms, exact, atol=0.05, rtol=0.02)
        torch.stack(terms).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
