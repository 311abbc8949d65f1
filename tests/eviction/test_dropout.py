"""KV dropout on small random models: the rule reaches every layer, draws are seeded, nothing stays behind."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.kept_columns import kept_columns_mask
from sparsekv_pl.eviction import dropout
from sparsekv_pl.eviction.dropout import NAME, KeptColumns, KVDropout, draw_kept, removed_tokens
from sparsekv_pl.models.anchors import Anchors, AnchorTable
from sparsekv_pl.models.layer_kinds import attentions, evicted_layers
from tests.random_models import random_model
from tests.windowed_models import windowed_model

VOCABULARY, CONTEXT, CONTINUATION = 97, 48, 12
DENSE = "test_dense_kept_columns"


def build(kind: str = "llama", **settings: Any) -> PreTrainedModel:
    return random_model(kind, vocab_size=VOCABULARY, **settings)


def ids() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    everything = torch.randint(9, VOCABULARY, (2, CONTEXT + CONTINUATION), generator=generator)
    everything[0, 10:16] = 0  # punctuation: the rows differ in their number of anchors
    return everything[:, :CONTEXT], everything[:, CONTEXT:]


def kv_dropout(recent: int = 4, **settings: Any) -> KVDropout:
    method = KVDropout(Anchors(sinks=2, recent=recent), query_chunk=16, **settings)
    special, punctuation = torch.zeros(2, VOCABULARY, dtype=torch.bool)
    punctuation[:9] = True
    method.tokenizer = AnchorTable(special, punctuation)
    return method


def gradients(hidden: Tensor, model: PreTrainedModel) -> list[Tensor]:
    model.zero_grad()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * direction).sum().backward()
    return [parameter.grad for parameter in model.get_decoder().parameters()]


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kept_columns: KeptColumns,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The slow reference as an attention function of its own."""
    real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    real = real if attention_mask is None else attention_mask
    mask = kept_columns_mask(kept_columns.draw(module.layer_idx, key.shape[1]), kept_columns.recent, real)
    mask, key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (mask, key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(DENSE, dense_attention)
AttentionMaskInterface.register(DENSE, dropout._padding_mask)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_without_compression_it_is_a_plain_forward(architecture):
    model = build(architecture)
    evicted = kv_dropout()(model, *ids(), compression_ratio=0.0, step=0)
    plain = model.get_decoder()(torch.cat(ids(), dim=1)).last_hidden_state[:, CONTEXT:]
    assert evicted.kept_share == 1.0
    assert evicted.selections == []
    assert evicted.hidden.shape == (2, CONTINUATION, 32)
    torch.testing.assert_close(evicted.hidden, plain, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(evicted.hidden, model), gradients(plain, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_equal_to_dense_masks_in_every_layer(architecture, monkeypatch):
    model = build(architecture)
    ours = kv_dropout()(model, *ids(), compression_ratio=0.7, step=3).hidden
    plain = kv_dropout()(model, *ids(), compression_ratio=0.0, step=3).hidden
    our_gradients = gradients(ours, model)
    monkeypatch.setattr(dropout, "NAME", DENSE)
    theirs = kv_dropout()(model, *ids(), compression_ratio=0.7, step=3).hidden
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for mine, other in zip(our_gradients, gradients(theirs, model), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["gemma3", "qwen2", "lfm2", "falcon-h1"])
def test_layers_with_a_window_or_a_state_drop_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In values and gradients, far beyond the window, against masks of transformers' own attention."""
    model, method = windowed_model(kind), kv_dropout()
    context, continuation = (part % 55 + 3 for part in ids())
    method.tokenizer = AnchorTable(*torch.zeros(2, VOCABULARY, dtype=torch.bool))
    drawn_by_layer: dict[int, Tensor] = {}

    def remembered(*args: Any) -> Tensor:
        drawn_by_layer[args[-2]] = draw_kept(*args)
        return drawn_by_layer[args[-2]]

    monkeypatch.setattr(dropout, "draw_kept", remembered)
    found = method(model, context, continuation, compression_ratio=0.7, step=3).hidden
    our_gradients = gradients(found, model)
    assert sorted(drawn_by_layer) == evicted_layers(model.config)
    real = torch.ones(2, CONTEXT + CONTINUATION, dtype=torch.bool)

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kept_columns_mask(drawn_by_layer[module.layer_idx], 4, real)
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask.repeat_interleave(2, dim=1)}

    with ExitStack() as stack:
        stack.enter_context(attention_implementation(model, "sdpa"))
        for layer, module in attentions(model).items():
            if layer in drawn_by_layer:
                stack.callback(module.register_forward_pre_hook(hide, with_kwargs=True).remove)
        whole = model.model(torch.cat([context, continuation], 1), use_cache=False).last_hidden_state
    torch.testing.assert_close(found, whole[:, CONTEXT:], rtol=1e-4, atol=1e-4)
    mine, other = (
        torch.cat([g.flatten() for g in each]) for each in (our_gradients, gradients(whole[:, CONTEXT:], model))
    )
    assert (mine - other).norm() / other.norm() < 1e-4


def drawn(step: int = 0, seed: int = 0, layer: int = 0, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    always = torch.zeros(2, 40, dtype=torch.bool)
    always[:, :4], always[1, 4:20] = True, True
    return always, draw_kept(
        always, removed_tokens(always, ratio), [(seed, step, row) for row in range(2)], layer, kv_heads=3
    )


def test_every_head_keeps_the_anchors_and_as_many_others():
    always, kept = drawn(ratio=0.7)
    assert removed_tokens(always, 0.7).tolist() == [25, 14]
    assert kept.shape == (2, 3, 26)
    for row, count in enumerate((15, 26)):
        for head in range(3):
            members = kept[row, head][:count]
            assert (kept[row, head][count:] == 40).all()
            assert members.unique().tolist() == members.tolist() and members.max() < 40
            assert set(always[row].nonzero().flatten().tolist()) <= set(members.tolist())


def test_draws_differ_by_seed_step_layer_head_and_repeat():
    base = drawn()[1]
    assert torch.equal(base, drawn()[1])
    for other in (drawn(seed=1), drawn(step=1), drawn(layer=1)):
        assert not torch.equal(base, other[1])
    assert not torch.equal(drawn(step=1)[1], drawn(layer=1)[1])
    assert not torch.equal(base[:, 0], base[:, 1])
    before = torch.get_rng_state()
    drawn()
    assert torch.equal(before, torch.get_rng_state())


def test_kept_share_counts_anchors_and_the_context_alone():
    method, model, (context, continuation) = kv_dropout(), build(), ids()
    evictable = (~method.anchors.mask(context, method.tokenizer)).sum(dim=1)
    assert evictable[0] != evictable[1]
    expected = 1 - sum(round(0.5 * n) for n in evictable.tolist()) / (2 * CONTEXT)
    evicted = method(model, context, continuation, compression_ratio=0.5, step=0)
    assert evicted.kept_share == pytest.approx(expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(side):
    model, tokens = build(), ids()[0]
    kept = draw_kept(torch.zeros_like(tokens, dtype=torch.bool), torch.tensor([30, 30]), [(0, 0, 0), (0, 0, 1)], 0, 2)
    pad = torch.zeros(2, 7, dtype=torch.long)
    mask = torch.ones_like(tokens)
    left = side == "left"
    padded = torch.cat([pad, tokens] if left else [tokens, pad], dim=1)
    padded_mask = torch.cat([pad, mask] if left else [mask, pad], dim=1)
    # A kept set may even name padding: the padding mask hides it.
    named = torch.arange(7).expand(2, 2, 7) if left else torch.arange(48, 55).expand(2, 2, 7)
    padded_kept = torch.cat([named, kept + 7] if left else [kept, named], dim=-1)
    positions = (padded_mask.cumsum(dim=1) - 1).clamp(min=0)

    def run(tokens: Tensor, kept: Tensor, **inputs: Tensor) -> Tensor:
        columns = KeptColumns(lambda *_: kept, recent=4, query_chunk=16)
        with attention_implementation(model, NAME):
            return model(tokens, kept_columns=columns, use_cache=False, **inputs).logits

    plain = run(tokens, kept)
    ours = run(padded, padded_kept, attention_mask=padded_mask, position_ids=positions)
    torch.testing.assert_close(ours[:, 7:] if left else ours[:, :-7], plain, rtol=0, atol=1e-5)


def test_checkpointed_layers_recompute_with_the_same_draws():
    model = build().train()
    plain = kv_dropout()(model, *ids(), compression_ratio=0.7, step=1).hidden
    expected = gradients(plain, model)
    model.gradient_checkpointing_enable()
    functions = [layer._gradient_checkpointing_func for layer in model.get_decoder().layers]
    checkpointed = kv_dropout()(model, *ids(), compression_ratio=0.7, step=1).hidden
    assert functions == [layer._gradient_checkpointing_func for layer in model.get_decoder().layers]
    for ours, theirs in zip(gradients(checkpointed, model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_autocast_runs_the_attention_in_its_dtype():
    model = build()
    exact = kv_dropout()(model, *ids(), compression_ratio=0.7, step=1).hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evicted = kv_dropout()(model, *ids(), compression_ratio=0.7, step=1).hidden
    error = (evicted - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
    assert all(torch.isfinite(gradient).all() for gradient in gradients(evicted.float(), model))


def test_the_models_own_attention_is_back_afterwards_also_after_an_error():
    model = build()
    before = model.config._attn_implementation
    kv_dropout()(model, *ids(), compression_ratio=0.5, step=0)
    assert model.config._attn_implementation == before
    model.config.attention_dropout = 0.1
    model = LlamaForCausalLM(model.config).train()
    with pytest.raises(ValueError, match=r"does not support \{'dropout': 0.1\}"):
        kv_dropout()(model, *ids(), compression_ratio=0.5, step=0)
    assert model.config._attn_implementation == before


def test_what_the_rule_cannot_express_is_refused():
    windowed = build("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=0, layer_types=None)
    with pytest.raises(ValueError, match=r"local window \(16\)"):
        kv_dropout()(windowed, *ids(), compression_ratio=0.5, step=0)
    with pytest.raises(ValueError, match=r"layers attend within chunks \(12\)"):
        kv_dropout()(windowed_model("llama4"), *ids(), compression_ratio=0.5, step=0)
    model, (context, _) = build(), ids()
    columns = KeptColumns(lambda *_: torch.zeros(2, 2, 1, dtype=torch.long), recent=4, query_chunk=16)
    cache = DynamicCache()
    model(context, past_key_values=cache, use_cache=True)
    with attention_implementation(model, NAME):
        with pytest.raises(ValueError, match="needs model"):
            model(context)
        with pytest.raises(ValueError, match="pass use_cache=False"):
            model(context, past_key_values=cache, kept_columns=columns)
        with pytest.raises(ValueError, match="packed sequences"):
            model(context, position_ids=torch.arange(CONTEXT)[None] % 20, use_cache=False)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_compression_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=f"compression_ratio is {ratio}"):
        kv_dropout()(build(), *ids(), compression_ratio=ratio, step=0)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="seed=-1"):
        KVDropout(seed=-1)
    with pytest.raises(ValueError, match="query_chunk=0"):
        KVDropout(query_chunk=0)
    with pytest.raises(ValueError, match="has no tokenizer"):
        KVDropout(Anchors(recent=4))(build(), *ids(), compression_ratio=0.5, step=0)
    with pytest.raises(ValueError, match="not longer than its anchors"):
        kv_dropout(recent=CONTEXT).check(CONTEXT)
