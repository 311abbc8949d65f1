"""kvpress's presses that compute attention by themselves, on models whose attention is not the usual softmax."""

import inspect
import re
from typing import Any

import kvpress
import pytest
import torch
from kvpress import (
    BasePress,
    ComposedPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    FinchPress,
    KeyDiffPress,
    ScorerPress,
    SnapKVPress,
    TOVAPress,
)
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.models.softmax_rule import SoftmaxRule
from sparsekv_pl.presses.caught_scores import pinned
from sparsekv_pl.presses.pressed_model import pressed
from sparsekv_pl.presses.scores_by_rule import _log_expected, scores_by_rule
from sparsekv_pl.presses.traits import table, traits_of
from tests.architecture_abilities import attention_weights, numbers, own_attention
from tests.architectures import architecture

RULED = {"gemma2": "caps the products", "granite": "by 0.25, not by 1", "gemma3_text": "by 0.2887, not by 1"}
TOKENS = 40
CAPPED, SCALING = 2.0, 12**-0.5
Inputs = dict[int, tuple[nn.Module, dict[str, Any], Tensor, Tensor]]
"""Layer -> the attention module, its forward's keywords, its cached keys and values (1, K, L, D)."""


def finch() -> FinchPress:
    press = FinchPress(0.5)
    press.window_size = 5
    return press


def inputs_of(model: PreTrainedModel) -> tuple[Inputs, dict[int, Tensor]]:
    """Run a text by the model's own code; return the hooks' inputs and the attention weights (1, H, L, L)."""
    found, cache = Inputs(), DynamicCache()

    def look(module: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        layer = cache.layers[module.layer_idx]
        assert layer.keys is not None and layer.values is not None
        found[module.layer_idx] = module, kwargs, layer.keys, layer.values

    decoder = decoder_of(model)
    hooks = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in decoder.layers]
    with own_attention(model), attention_weights(model) as weights:
        decoder(input_ids=numbers(1, TOKENS), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return found, dict(weights)


def scores_of(press: Any, seen: tuple[nn.Module, dict[str, Any], Tensor, Tensor], weights: Tensor | None) -> Tensor:
    module, kwargs, keys, values = seen
    scores: Tensor = press.score(module, kwargs["hidden_states"], keys, values, weights, kwargs)
    return scores


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda: SnapKVPress(0.5, 6), lambda: TOVAPress(0.5), finch], ids=["Snap", "TOVA", "Fin"]
)
@pytest.mark.parametrize("name", RULED)
def test_scores_by_the_last_queries_are_those_of_the_models_own_weights(name: str, make: Any) -> None:
    """kvpress takes the weights from a model that returns them: the same scores."""
    model, press = architecture(name), make()
    inputs, weights = inputs_of(model)
    for layer, seen in inputs.items():
        expected = scores_of(press, seen, weights[layer])
        with scores_by_rule(model, traits_of(press)):
            torch.testing.assert_close(scores_of(press, seen, None), expected, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(scores_of(press, seen, None), expected, rtol=1e-2)
    assert "score" not in vars(press)


def expectation(press: ExpectedAttentionPress, seen: Any, cap: float | None, sinks: Tensor | None) -> Tensor:
    """Integrate each query's Gaussian product with each key on a fine grid, in float64."""
    module, kwargs, keys, values = seen
    mean, covariance = (states.double() for states in press.get_query_statistics(module, kwargs["hidden_states"]))
    later = keys[:, :, press.n_sink :].double().repeat_interleave(2, dim=1)
    products = torch.einsum("bhnd,bhd->bhn", later, mean) * module.scaling
    spread = (torch.einsum("bhnd,bhde,bhne->bhn", later, covariance, later) * module.scaling**2).sqrt()
    points = torch.linspace(-10, 10, 20001, dtype=torch.double)
    density = torch.exp(-(points**2) / 2)
    logits = products[..., None] + spread[..., None] * points
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    masses = (logits.exp() * density).sum(-1) / density.sum()
    others = 0 if sinks is None else sinks.double().exp()[:, None]
    weights = (masses / (masses.sum(-1, keepdim=True) + others)).unflatten(1, (2, 2)).mean(2)
    return (weights + press.epsilon) * values[:, :, press.n_sink :].norm(dim=-1)


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_a_capped_expectation_is_its_integral_where_the_spread_is_several_caps(
    cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekv_pl.presses.scores_by_rule.KEYS", 3)
    mean = torch.linspace(-2 * cap, 2 * cap, 7, dtype=torch.double)[None, None].requires_grad_()
    variance = (torch.tensor([0.05, 0.33, 1, 2, 2.5, 4], dtype=torch.double) * cap).square()[None, :, None]
    variance = variance.expand(1, 6, 7).clone().requires_grad_()
    points = torch.linspace(-14, 14, 20001, dtype=torch.double)
    logits = cap * torch.tanh((mean[..., None] + variance.sqrt()[..., None] * points) / cap)
    expected = (logits + (-(points**2) / 2).log_softmax(0)).logsumexp(-1)
    found = _log_expected(SoftmaxRule(cap), mean.expand(1, 6, 7), variance)
    assert (found - expected).abs()[:, :5].max() < 1e-5  # 1e-2 to 6e-2 with 32 Gauss-Hermite points
    assert (found - expected).abs().max() < 5e-4
    single = _log_expected(SoftmaxRule(cap), mean.float().expand(1, 6, 7), variance.float())
    torch.testing.assert_close(single.double(), expected, atol=1e-3, rtol=1e-4)
    for mine, other in zip(
        *(torch.autograd.grad(one.sum(), (mean, variance)) for one in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(("name", "cap", "with_sinks"), [("gemma2", CAPPED, False), ("granite", None, True)])
def test_expected_attention_is_the_expectation_under_the_models_rule(
    name: str, cap: float | None, with_sinks: bool
) -> None:
    """No architecture that has sinks fits ExpectedAttention yet: Granite is given some."""
    model, press = architecture(name), ExpectedAttentionPress(0.5, n_future_positions=8, epsilon=0.01)
    inputs, _ = inputs_of(model)
    for module, *_ in inputs.values():
        module.rotary_emb = decoder_of(model).rotary_emb
        if with_sinks:
            module.sinks = nn.Parameter(torch.linspace(-1, 3, 4))
    for seen in inputs.values():
        with scores_by_rule(model, traits_of(press)):
            found = scores_of(press, seen, None)
        expected = expectation(press, seen, cap, torch.linspace(-1, 3, 4) if with_sinks else None)
        torch.testing.assert_close(found[:, :, press.n_sink :].double(), expected, atol=1e-5, rtol=1e-4)
        assert (found[:, :, : press.n_sink] > found[:, :, press.n_sink :].max()).all()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_covariance": False, "use_vnorm": False}], ids=["defaults", "means"])
def test_expected_attention_without_a_rule_is_kvpresss(options: dict[str, Any]) -> None:
    """Also where the factor alone is another: it is as if keys were longer."""
    plain, press = architecture("llama"), ExpectedAttentionPress(0.5, **options)
    inputs, _ = inputs_of(plain)
    for module, kwargs, keys, values in inputs.values():
        module.rotary_emb = decoder_of(plain).rotary_emb
        expected = scores_of(press, (module, kwargs, 2 * keys, values), None)
        module.scaling = 2 * module.head_dim**-0.5  # type: ignore[operator]
        with scores_by_rule(plain, traits_of(press)):
            found = scores_of(press, (module, kwargs, keys, values), None)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


NESTED: dict[str, Any] = {
    "SnapKV": lambda: SnapKVPress(0.5, 6),
    "CriticalKV": lambda: CriticalKVPress(TOVAPress(0.5)),
    "ExpectedAttention": lambda: ExpectedAttentionPress(0.5, n_future_positions=8),
    "Composed": lambda: ComposedPress([KeyDiffPress(0.2), SnapKVPress(0.5, 6)]),
}

OF_WEIGHTS = ("SnapKV", "CriticalKV")


@pytest.mark.parametrize("name", NESTED)
def test_prefill_replay_and_caught_scores_follow_the_rule(name: str) -> None:
    """In a wrapper too: where kvpress takes weights that the model returns, the same pairs stay; gradients flow."""
    model, ids, press = architecture("gemma2"), numbers(1, TOKENS), NESTED[name]()
    caught, own = prefill(model, ids, press, request=Request(scores=name != "Composed")), DynamicCache()
    again = RecordedPrefill(model, ids).evicted(press)
    if name in OF_WEIGHTS:
        with own_attention(model), press(pressed(model)):
            decoder_of(model)(input_ids=ids, past_key_values=own, cache_position=torch.arange(TOKENS))
    for layer in evicted_layers(model.config):
        found = caught.cache.layers[layer].keys
        assert found is not None and found.shape[2] < TOKENS
        torch.testing.assert_close(again.cache.layers[layer].keys, found)
        if name in OF_WEIGHTS:
            torch.testing.assert_close(own.layers[layer].keys, found, atol=1e-5, rtol=1e-4)
    if caught.selections:
        scores = caught.selections[0].scores
        free = scores.masked_fill(pinned(scores), 0).sum()
        weight = decoder_of(model).layers[1].self_attn.k_proj.weight
        assert torch.autograd.grad(free, weight)[0].any()


BY_ITSELF = [kind for kind, row in table().items() if getattr(row, "attends", "") == "by itself"]


@pytest.mark.parametrize(("name", "why"), RULED.items())
def test_a_press_with_another_attention_of_its_own_is_refused_by_name(name: str, why: str) -> None:
    model = architecture(name)

    class Own(ExpectedAttentionPress):
        def score(self, *args: Any) -> Tensor:
            return super().score(*args)

    assert len(BY_ITSELF) == 8
    inner = {kind: (KeyDiffPress(),) if kind is kvpress.CAMPress else () for kind in BY_ITSELF}
    presses: list[BasePress] = [kind(*inner[kind]) for kind in BY_ITSELF] + [Own()]
    for press in presses:
        refusal = rf"{type(press).__name__.removesuffix('Press')}.* by itself.*{why}|needs every layer"
        with pytest.raises(ValueError, match=refusal):
            check_press(model, press)
    for press in (SnapKVPress(0.5, 6), TOVAPress(0.5), ExpectedAttentionPress(0.5), KeyDiffPress(0.5)):
        check_press(model, press)
    check_press(architecture("llama"), kvpress.NonCausalAttnPress(0.5))


OTHER_SOFTMAX = {
    "LagKVPress": "of standard deviations",
    "FastKVzipPress": "products with a gate's own queries and keys",
    "KVzapPress": "a surrogate's output",
}


def test_every_press_of_kvpress_with_a_softmax_of_its_own_has_its_row() -> None:
    """A new kvpress may bring more."""
    for kind in (kind for kind in table() if kind.__module__.startswith("kvpress") and kind is not ScorerPress):
        source = inspect.getsource(inspect.getmodule(kind) or kvpress)
        own = re.search(r"softmax\(|compute_window_attention\(|softmax\b.*dim=", source)
        if not own or kind.__name__ in OTHER_SOFTMAX:
            continue
        row = table()[kind]
        assert (row(finch()) if callable(row) else row).attends, kind
