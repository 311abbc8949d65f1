"""Attention over a cache: equal to the stock implementations where those are right, and right where they are not."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.integrations import sdpa_attention

from sparsekv_pl.attention.evicted_attention import (
    CACHED,
    attention_implementation,
    cached_attention,
    passing,
)
from sparsekv_pl.attention.one_query import one_query
from sparsekv_pl.attention.windows import lower_right_mask
from tests.random_models import Build

CONTEXT, CONTINUATION = 20, 6


def ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(seed))


def hidden(model: PreTrainedModel, implementation: str, input_ids: Tensor, **kwargs: object) -> Tensor:
    with attention_implementation(model, implementation):
        return model.model(input_ids=input_ids, **kwargs).last_hidden_state


def states(queries: int, keys: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def module() -> SimpleNamespace:
    return SimpleNamespace(layer_idx=0, config=LlamaConfig(num_hidden_layers=1), num_key_value_groups=2, is_causal=True)


def dense(query: Tensor, key: Tensor, value: Tensor, visible_BHTS: Tensor) -> Tensor:
    """Softmax written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ key.transpose(2, 3)) / query.shape[-1] ** 0.5
    return (logits.masked_fill(~visible_BHTS, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("reference", ["sdpa", "eager"])
def test_a_prefill_equals_stock_attention_in_values_and_gradients(random_model: Build, reference: str) -> None:
    gradients = []
    outputs = []
    for name in (CACHED, reference):
        model = random_model()
        output = hidden(model, name, ids(CONTEXT))
        output.square().sum().backward()
        outputs.append(output)
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_may_keep_different_numbers_of_pairs(random_model: Build) -> None:
    """Reference: stock attention token by token, where no mask is needed."""
    model, continuation = random_model(), ids(CONTINUATION, seed=1)
    positions = torch.arange(CONTEXT, CONTEXT + CONTINUATION).unsqueeze(0)

    def evicted() -> DynamicCache:
        cache = DynamicCache()
        model.model(input_ids=ids(CONTEXT), past_key_values=cache)
        for layer, kept in zip(cache.layers, (13, 4), strict=True):
            layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]
        return cache

    at_once = hidden(model, CACHED, continuation, past_key_values=evicted(), position_ids=positions)
    cache, one_by_one = evicted(), []
    for t in range(CONTINUATION):
        token, position = continuation[:, t : t + 1], positions[:, t : t + 1]
        one_by_one.append(hidden(model, "sdpa", token, past_key_values=cache, position_ids=position))
    torch.testing.assert_close(at_once, torch.cat(one_by_one, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries, keys", [(1, 9), (5, 9), (9, 9)])
def test_values_and_gradients_equal_a_softmax_written_out(queries: int, keys: int) -> None:
    inputs = [x.requires_grad_() for x in states(queries, keys)]
    causal = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    output, _ = cached_attention(module(), *inputs, None)
    expected = dense(*inputs, causal.expand(2, 4, -1, -1))
    torch.testing.assert_close(output, expected)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    got, wanted = (torch.autograd.grad((x * weights).sum(), inputs) for x in (output, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("queries", [1, 5])
def test_keys_that_a_headwise_press_masks_are_hidden_from_their_head_alone(queries: int) -> None:
    keys, layer = 9, module()
    query, key, value = states(queries, keys)
    before = key.clone()
    layer.masked_key_indices = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([2, 3, 0]))
    output, _ = cached_attention(layer, query, key, value, None)

    visible = (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries).repeat(2, 4, 1, 1)
    visible[0, :2, :, 2] = visible[0, 2:, :, 3] = visible[1, 2:, :, 0] = False
    torch.testing.assert_close(output, dense(query, key, value, visible))
    assert torch.equal(key, before)


def test_a_new_context_forgets_what_a_headwise_press_masked() -> None:
    layer = module()
    layer.masked_key_indices = (torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    inputs = states(4, 4)
    output, _ = cached_attention(layer, *inputs, None)
    assert layer.masked_key_indices is None
    torch.testing.assert_close(output, dense(*inputs, torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 4, -1, -1)))


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@torch.no_grad()
def test_the_observer_sees_queries_keys_and_values_after_rope(random_model: Build) -> None:
    model, cache = random_model(), DynamicCache()
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
    hidden(model, CACHED, ids(CONTEXT), past_key_values=cache)
    hidden(model, CACHED, ids(CONTINUATION, seed=1), past_key_values=cache, observer=lambda *shown: seen.append(shown))
    assert [layer for layer, *_ in seen] == [0, 1]
    for layer, query, key, value in seen:
        assert query.shape == (2, 4, CONTINUATION, 8)
        assert torch.equal(key, cache.layers[layer].keys)  # caches hold keys after RoPE
        assert torch.equal(value, cache.layers[layer].values)
        assert key.shape == (2, 2, CONTEXT + CONTINUATION, 8)


@torch.no_grad()
def test_observers_and_selectors_see_another_factor_in_the_queries(random_model: Build) -> None:
    model = random_model()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    tokens = ids(CONTEXT)
    seen: list[Tensor] = []

    def look(_: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG001
        logits = query @ key.repeat_interleave(2, 1).mT / 8**0.5
        seen.append(logits.masked_fill(torch.ones(CONTEXT, CONTEXT).triu(1).bool(), -torch.inf).softmax(-1))

    chosen: list[Tensor] = []
    selector = lambda layer, query, key: chosen.append(query)  # noqa: ARG005, E731
    hidden(model, CACHED, tokens, past_key_values=DynamicCache(), observer=look, selector=selector)
    with attention_implementation(model, "eager"):
        attentions = model(input_ids=tokens, output_attentions=True).attentions
    assert len(seen) == len(chosen) == len(attentions) == 2
    for ours, eager in zip(seen, attentions, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_the_implementation_is_restored_even_after_an_exception(random_model: Build) -> None:
    model = random_model()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), attention_implementation(model, CACHED):
        with attention_implementation(model, "eager"):
            assert model.config._attn_implementation == "eager"
        assert model.config._attn_implementation == CACHED
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before != CACHED


def test_padding_is_refused_and_a_mask_of_ones_is_not(random_model: Build) -> None:
    model, mask = random_model(), torch.ones(2, CONTEXT, dtype=torch.int64)
    hidden(model, CACHED, ids(CONTEXT), attention_mask=mask)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="no padding"):
        hidden(model, CACHED, ids(CONTEXT), attention_mask=mask)


def test_what_a_window_hides_is_not_measured_as_if_it_were_seen() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(64, 32, 48, 1, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    model, layers = MistralForCausalLM(config), list[int]()
    for asked in ({"observer": lambda layer, *_: layers.append(layer)}, {"selector": lambda *_: None}):
        with passing(model, **asked):
            hidden(model, CACHED, ids(8))
            with pytest.raises(ValueError, match="look back 8 tokens only"):
                hidden(model, CACHED, ids(9))
    assert layers == [0]


@pytest.mark.parametrize("masked", [None, "rows", "heads"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_is_what_pytorch_computes(masked: str | None, scaling: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 8, generator=generator)
    key, value = (torch.randn(2, 3, 20, 8, generator=generator) for _ in "kv")
    shape = {"rows": (2, 1, 1, 20), "heads": (2, 6, 1, 20)}.get(masked or "")
    mask = None if shape is None else torch.rand(shape, generator=generator) > 0.4
    ours = one_query(query, key, value, mask, scaling)
    reference = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, enable_gqa=True
    )
    torch.testing.assert_close(ours, reference.transpose(1, 2))
    rounded = one_query(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, scaling)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), ours, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("hidden_pairs", [False, True])
def test_keys_and_values_are_not_copied_for_every_query_head(
    hidden_pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is transformers' call, which makes those copies: values are its own, gradients but for rounding."""
    query, key, value = (part.requires_grad_() for part in states(5, 12))
    attending, mask = module(), lower_right_mask(5, 12, query.device)
    if hidden_pairs:
        attending.masked_key_indices = [torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2, 3])]
        visible = torch.ones(2, 2, 12, dtype=torch.bool)
        visible[0, 1, 2] = visible[1, 0, 3] = False
        mask = visible.repeat_interleave(2, 1).unsqueeze(2) & mask
    expected = sdpa_attention.sdpa_attention_forward(attending, query, key, value, mask)[0]
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value))
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
    attended = cached_attention(attending, query, key, value, None)[0]
    assert torch.equal(attended, expected)
    found = torch.autograd.grad(attended.square().sum(), (query, key, value))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
