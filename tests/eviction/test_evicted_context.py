"""The evicted context for objectives: the lost shares, and repeated continuations."""

from collections.abc import Callable

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyRerotationPress,
    KnormPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.interface import Evicted, EvictedContext
from sparsekv_pl.eviction.kept_positions import kept_positions
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction, evicted_context
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import set_compression_ratio
from tests.random_models import Build

CONTEXT, CONTINUATION, RATIO = 40, 8, 0.6

CHUNKS = pytest.mark.parametrize("chunk_tokens", [None, 10])
PRESSES: list[Callable[[], BasePress]] = [
    lambda: KnormPress(RATIO),
    lambda: SnapKVPress(RATIO, window_size=4),
    lambda: ExpectedAttentionPress(RATIO),
    lambda: StreamingLLMPress(RATIO),
    lambda: PyramidKVPress(RATIO, window_size=4),
    lambda: CriticalKVPress(SnapKVPress(RATIO, window_size=4)),
    lambda: KeyRerotationPress(KnormPress(RATIO)),
    lambda: EvictionAugPress([KnormPress(RATIO), SnapKVPress(RATIO, window_size=4)]),
]


def ids() -> tuple[Tensor, Tensor]:
    """No token twice in a row, so that no two pairs of the first layer are equal."""
    everything = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).argsort(1)
    return everything[:, :CONTEXT], everything[:, CONTEXT : CONTEXT + CONTINUATION]


def evict(model: PreTrainedModel, chunk_tokens: int | None, press: BasePress | None = None) -> Evicted:
    eviction = RealEviction(press or SnapKVPress(window_size=4), chunk_tokens)
    return eviction(model, *ids(), compression_ratio=RATIO, step=0, request=Request(contexts=True))


def context_of(evicted: Evicted) -> EvictedContext:
    assert evicted.context is not None
    return evicted.context


@torch.no_grad()
@pytest.mark.parametrize("make", PRESSES, ids=[press_name(make()) for make in PRESSES])
def test_lost_is_the_share_of_layers_and_heads_that_hold_no_pair_of_the_token(
    make: Callable[[], BasePress], random_model: Build
) -> None:
    model = random_model()
    before = prefill(model, ids()[0], None).cache
    after = prefill(model, ids()[0], make(), request=Request(contexts=True))
    kept = kept_positions(before, after.cache, rotary=decoder_of(model).rotary_emb)
    context = evicted_context(model, after, ids()[0])
    expected = 1 - torch.stack([layer.float().mean(1) for layer in kept]).mean(0)
    torch.testing.assert_close(context.lost, expected, rtol=0, atol=1e-6)
    assert torch.equal(context.ids, ids()[0])
    assert 0.3 < float(context.lost.mean()) < 0.9


@torch.no_grad()
@pytest.mark.parametrize("press", [KnormPress(), SnapKVPress(window_size=4)], ids=press_name)
def test_lost_after_many_chunks_is_read_off_the_values_of_a_single_layer(press: BasePress, random_model: Build) -> None:
    """A value of the first layer depends on its token alone, so it identifies its position."""
    model = random_model(num_hidden_layers=1)
    before = prefill(model, ids()[0], None).cache.layers[0].values
    set_compression_ratio(press, RATIO)
    after = prefill(model, ids()[0], press, 10, request=Request(contexts=True))
    held = after.cache.layers[0].values
    assert before is not None and held is not None
    nearest = (held.unsqueeze(3) - before.unsqueeze(2)).abs().amax(-1)
    assert float(nearest.amin(-1).max()) < 1e-5
    kept = torch.zeros(2, 2, CONTEXT).scatter(-1, nearest.argmin(-1), 1.0)
    expected = 1 - kept.mean(1)
    assert float(expected.mean()) == pytest.approx(RATIO)
    torch.testing.assert_close(evicted_context(model, after, ids()[0]).lost, expected, rtol=0, atol=1e-6)


@CHUNKS
def test_nothing_is_lost_at_compression_0(chunk_tokens: int | None, random_model: Build) -> None:
    eviction = RealEviction(SnapKVPress(window_size=4), chunk_tokens)
    evicted = eviction(random_model(), *ids(), compression_ratio=0.0, step=0, request=Request(contexts=True))
    assert float(context_of(evicted).lost.abs().max()) < 1e-6


@torch.no_grad()
def test_a_last_chunk_of_which_all_stays_is_not_lost(random_model: Build) -> None:
    """10 tokens leave 9 at a ratio of 0.05, and 20 leave 19: the second chunk evicts nothing, so nothing is scored."""
    model = random_model()
    after = prefill(model, ids()[0][:, :20], KnormPress(0.05), 10, request=Request(contexts=True))
    assert after.cache.get_seq_length() == 19
    lost = evicted_context(model, after, ids()[0][:, :20]).lost
    assert torch.equal(lost[:, 10:], torch.zeros(2, 10))
    torch.testing.assert_close(lost.sum(1), torch.ones(2))


@CHUNKS
@pytest.mark.parametrize("press", [SnapKVPress(window_size=4), KeyRerotationPress(KnormPress())], ids=press_name)
def test_continuing_again_gives_the_same_and_leaves_the_context_alone(
    press: BasePress, chunk_tokens: int | None, random_model: Build
) -> None:
    evicted = evict(random_model(), chunk_tokens, press)
    context, continuation = context_of(evicted), ids()[1]
    context.continued(continuation.flip(1))
    assert torch.equal(context.continued(continuation), evicted.hidden)
    assert torch.equal(context.continued(continuation), evicted.hidden)
    part = context.continued(continuation[:, :3])
    torch.testing.assert_close(part, evicted.hidden[:, :3], rtol=1e-5, atol=1e-5)


@CHUNKS
def test_gradients_flow_through_every_continuation(chunk_tokens: int | None, random_model: Build) -> None:
    model = random_model()
    weights = [parameter for name, parameter in model.named_parameters() if "k_proj" in name or "v_proj" in name]
    evicted = evict(model, chunk_tokens)
    expected = torch.autograd.grad(evicted.hidden.square().sum(), weights, retain_graph=True)
    twice = torch.stack([context_of(evicted).continued(ids()[1]).square().sum() for _ in range(2)]).sum()
    for once, gradient in zip(expected, torch.autograd.grad(twice, weights), strict=True):
        assert once.abs().max() > 0
        torch.testing.assert_close(gradient, 2 * once, rtol=1e-4, atol=1e-4 * float(once.abs().max()))


def test_a_press_whose_kept_pairs_are_unknown_is_refused(random_model: Build) -> None:
    with pytest.raises(ValueError, match="does not say which pairs it keeps"):
        evict(random_model(), None, AdaKVPress(SnapKVPress(window_size=4)))
