"""Presses that protect tokens by position leave the cache in order, so that the next one finds sinks and recents."""

from collections.abc import Callable

import pytest
import torch
from kvpress import BasePress, ComposedPress, KeyRerotationPress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.continuation import Continuation
from sparsekv_pl.eviction.kept_positions import kept_positions
from sparsekv_pl.eviction.prefill import ChunkedPrefill, prefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses import AnchorPress, BlockDropoutPress, SoftThresholdPress, VariableBlockPress
from sparsekv_pl.presses.nesting import press_name
from tests.random_models import Build

PLACES = Anchors(sinks=4, recent=8, special=False, punctuation=False)
DROPOUT = {"protect_start": 4, "protect_recent": 8}
ENDS = [*range(4), *range(88, 96)]


def ids(tokens: int, seed: int = 0) -> Tensor:
    """Make distinct tokens, so that keys of the first layer identify their tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(400, generator=generator)[:tokens] for _ in range(2)])


@pytest.fixture
def model(random_model: Build) -> PreTrainedModel:
    return random_model(vocab_size=400)


@torch.no_grad()
def kept(model: PreTrainedModel, press: BasePress) -> list[Tensor]:
    """(B, K, L) bool by layer, after one prefill of 96 tokens."""
    return kept_positions(prefill(model, ids(96), None).cache, prefill(model, ids(96), press).cache)


@pytest.mark.parametrize(
    "first, second",
    [
        (BlockDropoutPress(0.3, **DROPOUT, block_size=4), BlockDropoutPress(0.5, **DROPOUT, block_size=4, seed=1)),
        (AnchorPress(0.3, anchors=PLACES), AnchorPress(0.5, anchors=PLACES)),
        (AnchorPress(0.3, anchors=PLACES), VariableBlockPress(0.5, **DROPOUT)),
    ],
    ids=lambda press: press_name(press),
)
def test_a_second_one_protects_the_same_tokens(model: PreTrainedModel, first: BasePress, second: BasePress) -> None:
    model.train()
    for mask in kept(model, ComposedPress([first, second])):
        assert mask[..., ENDS].all()
        assert int(mask.sum(-1).unique()) == 33


def test_in_evaluation_soft_threshold_protects_behind_another(model: PreTrainedModel) -> None:
    press = ComposedPress([AnchorPress(0.3, anchors=PLACES), SoftThresholdPress(0.5, window_size=8)])
    for mask in kept(model.eval(), press):
        assert mask[..., ENDS].all()


@torch.no_grad()
@pytest.mark.parametrize("press", [SoftThresholdPress(window_size=8), AnchorPress(anchors=PLACES)], ids=press_name)
def test_the_first_and_the_newest_stay_while_tokens_are_decoded(model: PreTrainedModel, press: BasePress) -> None:
    model.eval()
    start, more = ChunkedPrefill(model, press, 96, request=Request(contexts=True)), ids(120, 9)
    start.run(ids(96))
    reading = Continuation(start, Decoding(40, budget=60, context=False), 0.0, 120)
    reading.read(more)
    everything = prefill(model, torch.cat([ids(96), more], 1), None).cache.layers[0].keys
    now = reading.reading.cache.layers[0].keys
    torch.testing.assert_close(now[:, :, :4], everything[:, :, :4])
    torch.testing.assert_close(now[:, :, -8:], everything[:, :, -8:])


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap", [KeyRerotationPress, lambda press: ComposedPress([press])], ids=["rotated", "composed"]
)
def test_in_evaluation_random_drops_pass_in_wrappers_too(
    model: PreTrainedModel, wrap: Callable[[BasePress], BasePress]
) -> None:
    inner = BlockDropoutPress(0.5, **DROPOUT)
    press = wrap(inner)
    assert prefill(model.eval(), ids(96), press).cache.get_seq_length() == 96
    assert prefill(model.train(), ids(96), press).cache.get_seq_length() == 48
    assert inner.compression_ratio == 0.5
