"""Eviction and quantisation together, in training: equal to a slow reference in values and gradients."""

from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, BasePress, ChunkKVPress, KeyDiffPress, KeyRerotationPress, KnormPress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.local_gradients import LocalGradients
from sparsekv_pl.eviction.prefill import ChunkedPrefill, continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.presses.nesting import press_name
from tests.eviction.slow_rounding import slowly_rounded
from tests.eviction.test_real import CONTEXT, gradients, ids, loss
from tests.random_models import Build

RATIO, CHUNK = 0.5, 14
FOUR = PairQuantisation(4, group=6, residual=3)


class Slow(ChunkedPrefill):
    """A prefill in which each kept number is rounded by itself; its gradient is that of the rounded number."""

    def advance(self, chunk_ids: Tensor) -> None:
        super().advance(chunk_ids)
        for layer in self.cache.layers:
            layer.keys, layer.values = Rounding.apply(layer.keys, layer.values)


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return slowly_rounded(keys, values, FOUR.bits, FOUR.group, FOUR.residual)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def evict(model: PreTrainedModel, press: BasePress, **settings: Any) -> Tensor:
    evicting = RealEviction(press, quantisation=FOUR, **settings)
    return evicting(model, *ids(), compression_ratio=RATIO, step=0).hidden


def slow(model: PreTrainedModel, press: Any, **settings: int) -> Tensor:
    press.compression_ratio = RATIO
    ordered = Request(contexts=True)
    return after(model, Slow(model, press, CONTEXT, request=ordered, **settings).run(ids()[0]))


def after(model: PreTrainedModel, prefilled: Prefilled) -> Tensor:
    return continue_from(model, ids()[1], prefilled.cache, prefilled.next_position)


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"chunk_tokens": CHUNK}, {"chunk_tokens": CHUNK, "budget": 9}], ids=str)
def test_training_reads_rounded_pairs_in_values_and_gradients(random_model: Build, settings: dict[str, int]) -> None:
    model, press = random_model(), KeyDiffPress()
    hidden, expected = evict(model, press, **settings), slow(model, press, **settings)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    wanted = gradients(model, expected)
    torch.testing.assert_close(gradients(model, hidden), wanted, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        whole = RealEviction(press, **settings)(model, *ids(), compression_ratio=RATIO, step=0).hidden
    assert (hidden - whole).abs().max() > 1e-3  # four bits are felt
    checkpointed = evict(model, press, checkpoint=True, **settings)
    torch.testing.assert_close(checkpointed, hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, checkpointed), wanted, rtol=1e-3, atol=1e-3)


def test_the_context_gets_the_gradient_at_the_rounded_pairs(random_model: Build) -> None:
    """Cut the graph at the kept pairs: what flows back into them is the gradient of what the continuation read."""
    model, press = random_model(), KnormPress(RATIO)
    kept = ChunkedPrefill(model, press, CONTEXT, request=Request(contexts=True)).run(ids()[0])
    pairs = [tensor for layer in kept.cache.layers for tensor in (layer.keys, layer.values)]
    leaves = []
    for layer in kept.cache.layers:
        rounded = slowly_rounded(layer.keys, layer.values, FOUR.bits, FOUR.group, FOUR.residual)
        layer.keys, layer.values = (part.requires_grad_() for part in rounded)
        leaves += [layer.keys, layer.values]
    parameters = list(model.model.parameters())
    own = torch.autograd.grad(loss(after(model, kept)), [*parameters, *leaves])
    through = torch.autograd.grad(pairs, parameters, own[len(parameters) :], allow_unused=True)
    expected = [a if b is None else a + b for a, b in zip(own, through, strict=False)]
    got = gradients(model, evict(model, press))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_without_quantisation_nothing_changes_and_nothing_is_packed(random_model: Build) -> None:
    model, press = random_model(), KnormPress(RATIO)
    plain = ChunkedPrefill(model, press, CONTEXT, CHUNK).run(ids()[0])
    filling = QuantisedPrefill(model, press, CONTEXT, CHUNK)
    assert torch.equal(after(model, filling.run(ids()[0])), after(model, plain)) and not filling.packed


@torch.no_grad()
def test_a_prefill_that_is_saved_and_loaded_between_chunks_ends_with_the_same_pairs(random_model: Build) -> None:
    model, context = random_model(), ids()[0]
    for press in (KeyDiffPress(RATIO), KeyRerotationPress(KeyDiffPress(RATIO))):
        whole = QuantisedPrefill(model, press, CONTEXT, CHUNK, quantisation=FOUR)
        expected = whole.run(context)
        first, second = (QuantisedPrefill(model, press, CONTEXT, CHUNK, quantisation=FOUR) for _ in range(2))
        first.advance(context[:, slice(*first.bounds[0])])
        state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        assert not any(name.startswith("first") for name in state)  # no key is held whole beside its rounded self
        second.load_state_dict(state)
        for start, stop in second.bounds[1:]:
            second.advance(context[:, start:stop])
        assert torch.equal(after(model, second.result()), after(model, expected))


@torch.no_grad()
def test_the_newest_pairs_stay_whole_and_an_unknown_order_is_refused(random_model: Build) -> None:
    model, context, newest = random_model(), ids()[0], PairQuantisation(2, residual=4)
    for press in (None, KeyDiffPress(RATIO), AdaKVPress(KnormPress(RATIO))):
        whole = ChunkedPrefill(model, press, CONTEXT, request=Request(contexts=True)).run(context).cache.layers[0]
        rounded = QuantisedPrefill(model, press, CONTEXT, quantisation=newest).run(context).cache.layers[0]
        assert whole.keys is not None and rounded.keys is not None
        assert torch.equal(rounded.keys[:, :, -4:], whole.keys[:, :, -4:])
        assert not torch.isclose(rounded.keys[:, :, :-4], whole.keys[:, :, :-4]).all(-1).any()
    with pytest.raises(ValueError, match=r"^residual=4: ChunkKV[^\n]+$"):
        QuantisedPrefill(model, ChunkKVPress(KnormPress(RATIO)), CONTEXT, quantisation=newest)


@pytest.mark.parametrize("press", [KeyDiffPress(), KeyRerotationPress(KnormPress())], ids=press_name)
def test_scores_chunks_and_local_gradients_are_there_as_for_whole_pairs(random_model: Build, press: BasePress) -> None:
    model, request = random_model(), Request(scores=True, chunks=True)
    for local in (None, LocalGradients()):
        shapes = []
        for quantisation in (None, PairQuantisation(8)):
            evicting = RealEviction(press, CHUNK, local_gradients=local, quantisation=quantisation)
            found = evicting(model, *ids(), compression_ratio=RATIO, step=0, request=request)
            assert found.chunks is not None and found.kept_share == RATIO
            gradients(model, found.hidden + sum(one.scores.sum() for one in found.selections))
            shapes.append([found.chunks.shape, *((one.layer, one.scores.shape) for one in found.selections)])
        assert shapes[0] == shapes[1]
