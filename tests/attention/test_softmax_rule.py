"""Attention with capped products and learnt sinks against dense code, and every measure of ours against the model's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.analysis.hot_blocks import HotBlocks
from sparsekv_pl.attention import attention_by_rule as ruled
from sparsekv_pl.attention.attention_by_rule import attention_by_rule
from sparsekv_pl.attention.blocks import Blocks
from sparsekv_pl.attention.received_attention import ReceivedAttention
from sparsekv_pl.attention.statistics import AttentionStatistics, StatisticsSettings
from sparsekv_pl.attention.windows import lower_right_mask
from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.prefill import continue_from, prefill
from sparsekv_pl.metrics.eviction_stability import ContextImportance
from sparsekv_pl.models.anchors import Anchors, AnchorTable
from sparsekv_pl.models.batch import Supervised
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.softmax_rule import SoftmaxRule
from sparsekv_pl.objectives.attention_mass import AttentionMass
from sparsekv_pl.presses.window_attention import window_attention
from tests.architecture_abilities import attention_weights, numbers, own_attention
from tests.architectures import architecture

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 2, 4, 2, 6, 11, 8
RULES = {"cap": (1.5, False), "sinks": (None, True), "both": (1.5, True)}
CONTEXT, STEPS = 24, 8
RULED = ["gemma2", "gpt_oss", "granite"]
"""Capped products, sinks, and another factor than 1 / sqrt(D)."""


def dense(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, rule: SoftmaxRule, scaling: float) -> Tensor:
    """As transformers' eager functions of Gemma 2 and GPT-OSS compute it, (B, T, H, D)."""
    key, value = (states.repeat_interleave(HEADS // KV_HEADS, dim=1) for states in (key, value))
    logits = query @ key.mT * scaling
    if rule.cap is not None:
        logits = torch.tanh(logits / rule.cap) * rule.cap
    logits = logits + hidden
    if rule.sinks is not None:
        logits = torch.cat([logits, rule.sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    return (logits.softmax(-1)[..., :KEYS] @ value).transpose(1, 2)


@pytest.mark.parametrize("masked", ["causal", "bool", "added"])
@pytest.mark.parametrize("floats", [2**24, 2 * BATCH * HEADS * KEYS])
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_are_those_of_dense_code(
    name: str, floats: int, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one strip, and in strips of two queries that are computed again for backward."""
    monkeypatch.setattr(ruled, "STRIP_FLOATS", floats)
    cap, with_sinks = RULES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, QUERIES), (KV_HEADS, KEYS), (KV_HEADS, KEYS)
    states = [torch.randn(BATCH, *shape, DIM, generator=generator).requires_grad_() for shape in shapes]
    sinks = torch.linspace(-1, 1, HEADS).requires_grad_() if with_sinks else None
    rule = SoftmaxRule(cap, sinks)
    visible = lower_right_mask(QUERIES, KEYS, torch.device("cpu")).expand(BATCH, 1, -1, -1).clone()
    if masked != "causal":
        visible[0, :, :, 2] = False
    added = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    mask = {"causal": None, "bool": visible, "added": added}[masked]
    found = attention_by_rule(*states, mask, rule, 0.7)
    expected = dense(*states, added, rule, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    upper = torch.randn(found.shape, generator=generator)
    inputs = [*states, *([] if sinks is None else [sinks])]
    gradients = (torch.autograd.grad(attended, inputs, upper) for attended in (found, expected))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


def observed(model: PreTrainedModel, observer: Any, before: int = 0) -> Any:
    """The observer after a pass over the tokens from ``before`` on."""
    ids, cache = numbers(1, CONTEXT + STEPS), DynamicCache()
    if before:
        continue_from(model, ids[:, :before], cache, 0)
    continue_from(model, ids[:, before:], cache, before, observer=observer)
    return observer


def mass(model: PreTrainedModel) -> dict[int, Tensor]:
    supervised = Supervised(torch.arange(STEPS)[None], [STEPS])
    return observed(model, AttentionMass(supervised, CONTEXT), CONTEXT).mass


def statistics(model: PreTrainedModel) -> dict[int, Tensor]:
    """Received attention and entropy, in several tiles of keys."""
    layers = observed(model, AttentionStatistics(StatisticsSettings(block_size=4, key_tile=8))).layers
    return {layer: torch.cat([each.received, each.entropy], dim=-1) for layer, each in layers.items()}


def entropies(weights: Tensor) -> Tensor:
    return -torch.special.xlogy(weights, weights).sum(-1)


Measure = tuple[Callable[[PreTrainedModel], dict[int, Tensor]], Callable[[Tensor], Tensor]]
MEASURES: dict[str, Measure] = {
    "attention mass": (mass, lambda w: w[:, :, CONTEXT:, :CONTEXT].mean(2).unflatten(1, (KV_HEADS, -1)).mean(2)),
    "received": (
        lambda model: {
            layer: each.by_key
            for layer, each in observed(
                model, ReceivedAttention(torch.zeros(1, CONTEXT + STEPS, dtype=torch.long), 1)
            ).layers.items()
        },
        lambda w: w.sum(2),
    ),
    "statistics": (statistics, lambda w: torch.cat([w.sum(2), entropies(w)], dim=-1)),
    "importance": (
        lambda model: observed(model, ContextImportance(CONTEXT), CONTEXT).importance,
        lambda w: w[:, :, CONTEXT:, :CONTEXT].unflatten(1, (KV_HEADS, -1)).mean(2),
    ),
    "hot blocks": (
        lambda model: observed(model, HotBlocks(CONTEXT, 8)).layers,
        lambda w: w[:, :, -1, :CONTEXT].unflatten(-1, (-1, 8)).sum(-1),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", RULED)
def test_every_measure_of_attention_is_of_the_models_own_weights(name: str) -> None:
    model = architecture(name)
    with own_attention(model), attention_weights(model) as weights:
        decoder_of(model)(input_ids=numbers(1, CONTEXT + STEPS), use_cache=False)
    for what, (found, expected) in MEASURES.items():
        for layer, value in found(model).items():
            torch.testing.assert_close(value, expected(weights[layer]), atol=1e-5, rtol=1e-4, msg=f"{what}, {layer}")


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_window_attention_follows_the_models_rule(name: str) -> None:
    model, ids, cache = architecture(name), numbers(1, CONTEXT), DynamicCache()
    calls: dict[int, Tensor] = {}

    def look(module: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        keys = cache.layers[module.layer_idx].keys
        assert keys is not None
        calls[module.layer_idx] = window_attention(module, kwargs["hidden_states"], keys, kwargs, STEPS)

    for layer in decoder_of(model).layers:
        layer.self_attn.register_forward_hook(look, with_kwargs=True)
    with own_attention(model), attention_weights(model) as weights:
        decoder_of(model)(input_ids=ids, past_key_values=cache)
    for layer, found in calls.items():
        torch.testing.assert_close(found, weights[layer][:, :, -STEPS:], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rows_that_decode_together_keep_the_rule() -> None:
    """Padded questions of one cache, and sixteen bits."""
    model = architecture("gemma2")
    questions, lengths = numbers(2, STEPS, rows=2), torch.tensor([STEPS, 3])
    together = greedy(model, prefill(model, numbers(1, CONTEXT).expand(2, -1), None), questions, lengths, [4, 4])
    short = prefill(model, numbers(1, CONTEXT), None)
    assert together[1] == greedy(model, short, questions[1:, :3], lengths[1:], [4])[0]
    half = model.bfloat16()
    assert len(greedy(half, prefill(half, numbers(1, CONTEXT), None), questions[:1], lengths[:1], [4])[0]) == 4


@torch.no_grad()
@pytest.mark.parametrize(("name", "why"), [("gemma2", "caps the products"), ("gpt_oss", "learnt attention sinks")])
def test_what_does_not_know_the_rule_is_refused_by_name(name: str, why: str) -> None:
    model, ids = architecture(name), numbers(1, CONTEXT)

    def looks(*_: Any) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match=f"function is computed under the usual softmax.*{why}"):
        continue_from(model, ids, DynamicCache(), 0, observer=looks)
    blocks = Blocks(torch.zeros(1, 1, 1, 1, dtype=torch.long), 64, CONTEXT)
    with pytest.raises(ValueError, match=f"block-sparse attention is computed under the usual softmax.*{why}"):
        continue_from(model, ids, DynamicCache(), 0, selector=lambda *_: blocks)
    dropout = KVDropout(Anchors(sinks=1, recent=2))
    dropout.tokenizer = AnchorTable(torch.zeros(64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool))
    with pytest.raises(ValueError, match="KV dropout does not support"):
        dropout(model, numbers(1, 16), ids, compression_ratio=0.5, step=0)
