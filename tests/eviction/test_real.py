"""Real eviction in one chunk: equal to one pass whose mask hides what the press dropped, and to kvpress's own use."""

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    PerLayerCompressionPress,
    PyramidKVPress,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.eviction.chunking import chunk_bounds
from sparsekv_pl.eviction.prefill import continue_from, full_cache, prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.traits import traits_of
from tests.random_models import Build

CONTEXT, CONTINUATION = 40, 8
RATIO, KEPT = 0.6, 16

scorers = pytest.mark.parametrize(
    "press",
    [KnormPress(), ExpectedAttentionPress(), SnapKVPress(window_size=4), TOVAPress(), KeyDiffPress()],
    ids=press_name,
)


def ids() -> tuple[Tensor, Tensor]:
    everything = torch.randint(0, 64, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    return everything[:, :CONTEXT], everything[:, CONTEXT:]


def evict(model: PreTrainedModel, press: BasePress, ratio: float = RATIO, chunk_tokens: int | None = None) -> Tensor:
    return RealEviction(press, chunk_tokens)(model, *ids(), compression_ratio=ratio, step=0).hidden


def plain(model: PreTrainedModel) -> Tensor:
    """Run one pass of transformers, without eviction."""
    return model.model(input_ids=torch.cat(ids(), 1)).last_hidden_state[:, CONTEXT:]


@torch.no_grad()
def kept_by(model: PreTrainedModel, press: ScorerPress) -> list[Tensor]:
    """Per layer (B, K, KEPT): the context positions that kvpress's own prefill keeps."""
    press.compression_ratio = RATIO
    with catch_scores(press) as caught, press(model):
        model.model(input_ids=ids()[0], past_key_values=DynamicCache())
    return [scored.scores.topk(KEPT, dim=-1).indices for scored in caught]


def masked(model: PreTrainedModel, kept: list[Tensor]) -> Tensor:
    """The dense reference: one stock pass in which the continuation's rows do not see the dropped context keys."""
    tokens, dtype = CONTEXT + CONTINUATION, model.dtype

    def hide(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        is_kept = torch.zeros(2, 2, tokens, dtype=torch.bool).scatter(2, kept[module.layer_idx], True)
        is_kept[..., CONTEXT:] = True
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(2, 2, 1, 1)
        visible[:, :, CONTEXT:] &= is_kept[:, :, None]
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        return args, kwargs | {"attention_mask": mask.repeat_interleave(2, dim=1)}

    hooks = [layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.model.layers]
    with attention_implementation(model, "sdpa"):
        hidden = plain(model)
    for hook in hooks:
        hook.remove()
    return hidden


def loss(hidden: Tensor) -> Tensor:
    """Weighs every output differently. (The final norm fixes their mean square.)"""
    weights = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    return (hidden * weights).sum()


def gradients(model: PreTrainedModel, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss(hidden), list(model.model.parameters())))


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@scorers
@pytest.mark.parametrize("layers", [1, 2])
def test_gathered_and_masked_eviction_agree_in_values_and_gradients(
    random_model: Build, press: ScorerPress, layers: int
) -> None:
    model = random_model(num_hidden_layers=layers).double()
    hidden, expected = evict(model, press), masked(model, kept_by(model, press))
    torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(model, hidden), gradients(model, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [None, 40, 13, 6])
def test_compression_0_equals_a_plain_forward_in_values_and_gradients(
    random_model: Build, chunk_tokens: int | None
) -> None:
    model = random_model()
    hidden, expected = evict(model, KnormPress(), 0.0, chunk_tokens), plain(model)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, hidden), gradients(model, expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full_cache(model, *ids()), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_a_press_chunks_change_nothing(random_model: Build) -> None:
    model, (context, continuation) = random_model(), ids()
    prefilled = prefill(model, context, None, chunk_tokens=7)
    assert prefilled.next_position == CONTEXT
    hidden = continue_from(model, continuation, prefilled.cache, prefilled.next_position)
    torch.testing.assert_close(hidden, plain(model), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def token_by_token(model: PreTrainedModel, press: BasePress) -> Tensor:
    """Run a press as kvpress's pipeline does: transformers' attention, one continuation token at a time."""
    (context, continuation), cache = ids(), DynamicCache()
    with press(model):
        model.model(input_ids=context, past_key_values=cache)
    first = cache.get_seq_length() if traits_of(press).re_rotates else CONTEXT
    steps = [
        model.model(
            input_ids=continuation[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[first + t]])
        ).last_hidden_state
        for t in range(CONTINUATION)
    ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize(
    "press",
    [
        KnormPress(0.5),
        StreamingLLMPress(0.7),
        PyramidKVPress(0.5, window_size=4, beta=4),
        PerLayerCompressionPress(KnormPress(), [0.2, 0.7]),
        AdaKVPress(KnormPress(0.5)),
        AdaKVPress(SnapKVPress(0.7, window_size=4)),
        KeyRerotationPress(ExpectedAttentionPress(0.5)),
        CriticalKVPress(SnapKVPress(0.5, window_size=4)),
        SimLayerKVPress(lazy_threshold=0.0, n_recent=8),
        EvictionAugPress([TOVAPress(0.5), KnormPress(0.5)], score_all=True),
    ],
    ids=press_name,
)
def test_equals_kvpress_token_by_token(random_model: Build, press: BasePress) -> None:
    model, (context, continuation) = random_model(), ids()
    expected = token_by_token(model, press)
    prefilled = prefill(model, context, press)
    hidden = continue_from(model, continuation, prefilled.cache, prefilled.next_position)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert (hidden - plain(model)).abs().max() > 1e-3
    assert all(grad.isfinite().all() for grad in gradients(model, hidden))


def test_kept_share_counts_what_is_in_the_cache(random_model: Build) -> None:
    evicted = RealEviction(KnormPress())(random_model(), *ids(), compression_ratio=RATIO, step=0)
    assert evicted.kept_share == KEPT / CONTEXT
    assert evicted.hidden.shape == (2, CONTINUATION, 32)
    assert evicted.selections == []


def test_the_step_draws_the_press(random_model: Build) -> None:
    model, members = random_model(), [KnormPress(), TOVAPress()]
    for step in range(6):
        eviction = RealEviction(EvictionAugPress(list(members)))
        hidden = eviction(model, *ids(), compression_ratio=RATIO, step=step).hidden
        drawn = EvictionAugPress(list(members)).draw(step)
        assert torch.equal(hidden, evict(model, drawn))


@pytest.mark.parametrize(
    "tokens, chunk_tokens, bounds",
    [(10, None, [(0, 10)]), (10, 10, [(0, 10)]), (10, 9, [(0, 5), (5, 10)]), (11, 4, [(0, 3), (3, 7), (7, 11)])],
)
def test_chunks_are_the_fewest_and_equal(tokens: int, chunk_tokens: int | None, bounds: list[tuple[int, int]]) -> None:
    assert chunk_bounds(tokens, chunk_tokens) == bounds


@pytest.mark.parametrize("setting", ["chunk_tokens", "budget"])
def test_less_than_one_token_is_an_error(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=0 must be at least 1"):
        RealEviction(KnormPress(), **{setting: 0})


@pytest.mark.parametrize("press", [SnapKVPress(window_size=CONTEXT), ExpectedAttentionPress(n_sink=CONTEXT)])
def test_a_context_that_the_press_cannot_look_at_is_an_error(random_model: Build, press: BasePress) -> None:
    with pytest.raises(ValueError, match=f"window of {CONTEXT} tokens"):
        RealEviction(press).check(CONTEXT)
    RealEviction(press).check(CONTEXT + 1)
    with pytest.raises(ValueError, match=f"window of {CONTEXT} tokens"):
        prefill(random_model(), ids()[0], press)


def test_pairs_that_a_press_hides_do_not_count_as_kept(random_model: Build) -> None:
    hiding = RealEviction(AdaKVPress(SnapKVPress(window_size=4)))
    evicted = hiding(random_model(), *ids(), compression_ratio=0.5, step=0)
    assert evicted.kept_share == pytest.approx(0.5, abs=0.02)
