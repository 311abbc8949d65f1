"""Whole spans are dropped, only in training, by draws of seed, step and position alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import BasePress, DecodingPress, KeyRerotationPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.span_dropout import Shown, SpanDropoutPress
from sparsekv_pl.presses.variable_block import VariableBlockPress
from tests.random_models import Build

CONTEXT, RATIO = 60, 0.5


def blocks(ratio: float = RATIO, **settings: Any) -> BlockDropoutPress:
    return BlockDropoutPress(ratio, **{"block_size": 7, "protect_start": 3, "protect_recent": 6} | settings)


def variable(ratio: float = RATIO, **settings: Any) -> VariableBlockPress:
    defaults = {"shortest": 3, "longest": 9, "protect_start": 3, "protect_recent": 6}
    return VariableBlockPress(ratio, **defaults | settings)


both = pytest.mark.parametrize("build", [blocks, variable])


def context(seed: int = 0, rows: int = 2, tokens: int = CONTEXT) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def evicted(model: PreTrainedModel, press: BasePress | None, ids: Tensor, **stock: Any) -> DynamicCache:
    """Evict as kvpress's pipeline does, with stock attention, in training."""
    cache = DynamicCache()
    model.train()
    if press is None:
        model.model(input_ids=ids, past_key_values=cache, **stock)
    else:
        with press(model):
            model.model(input_ids=ids, past_key_values=cache, **stock)
    return cache


def kept(model: PreTrainedModel, press: BasePress, ids: Tensor, **stock: Any) -> Tensor:
    """Return (layers, B, K, S) bool, True for keys of the full cache that are in the evicted cache."""
    pairs = zip(evicted(model, None, ids, **stock).layers, evicted(model, press, ids, **stock).layers, strict=True)
    return torch.stack([(full.keys[:, :, :, None] == left.keys[:, :, None]).all(-1).any(-1) for full, left in pairs])


def spans_in(model: PreTrainedModel, press: SpanDropoutPress, ids: Tensor, **stock: Any) -> list[Tensor]:
    """Return the spans of ``press``, layer by layer."""
    found: list[Tensor] = []
    known = press.spans
    press.spans = lambda shown: (found.append(known(shown)), found[-1])[1]  # type: ignore[method-assign]
    evicted(model, press, ids, **stock)
    vars(press).pop("spans")
    return [spans.expand(-1, 2, -1) for spans in found]


@both
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.77])
def test_all_that_goes_is_whole_spans_but_one(random_model: Build, build: Callable[..., Any], ratio: float) -> None:
    model, press = random_model(), build(ratio)
    keeping, spans = kept(model, press, context()), torch.stack(spans_in(model, press, context()))
    assert (keeping.sum(-1) == int(CONTEXT * (1 - ratio))).all()
    assert keeping[..., :3].all() and keeping[..., -6:].all()
    for stays, span in zip(keeping.view(-1, CONTEXT), spans.reshape(-1, CONTEXT), strict=True):
        droppable = range(3, CONTEXT - 6)
        parts = [[bool(stays[i]) for i in droppable if span[i] == number] for number in span.unique()]
        cut = [part for part in parts if len(set(part)) == 2]
        assert len(cut) <= 1
        assert all(part == sorted(part) for part in cut)  # the first tokens go first


def test_blocks_are_counted_from_the_first_key(random_model: Build) -> None:
    spans = spans_in(random_model(), blocks(), context())[0]
    assert spans[1, 1].tolist() == [i // 7 for i in range(CONTEXT)]


def test_block_lengths_vary_within_their_range_by_head_and_step(random_model: Build) -> None:
    model, press, lengths = random_model(num_hidden_layers=1), variable(), []
    firsts = set()
    for step in range(40):
        press.draw(step)
        spans = spans_in(model, press, context())[0]
        assert ((spans.diff(dim=-1) == 0) | (spans.diff(dim=-1) == 1)).all() and (spans[..., 0] == 0).all()
        firsts.add(tuple((spans == 0).sum(-1).flatten().tolist()))
        for span in spans.reshape(-1, CONTEXT):
            *whole, last = span.bincount().tolist()
            lengths += whole
            assert last <= 9
    assert set(lengths) == set(range(3, 10))
    mean = sum(lengths) / len(lengths)
    assert mean == pytest.approx(6, abs=0.4)  # a little below: longer blocks are cut by the context's end more often
    assert len(firsts) > 30


def test_one_length_makes_fixed_blocks(random_model: Build) -> None:
    fixed, drawn = blocks(), variable(shortest=7, longest=7)
    drawn.__class__ = type(type(fixed).__name__, (type(drawn),), {})  # every class draws by its name
    assert torch.equal(kept(random_model(), fixed, context()), kept(random_model(), drawn, context()))


@both
def test_layers_heads_and_rows_have_their_own_draws_unless_shared(
    random_model: Build, build: Callable[..., Any]
) -> None:
    model = random_model()
    own, shared = kept(model, build(), context()), kept(model, build(shared=True), context())
    assert len({tuple(mask.tolist()) for mask in own.view(-1, CONTEXT)}) == 8
    assert (shared == shared[:1, :, :1]).all()
    assert not torch.equal(shared[0, 0, 0], shared[0, 1, 0])


def order_of_keys(model: PreTrainedModel, press: BasePress, ids: Tensor, **stock: Any) -> Tensor:
    """Return the keys in the order in which they are dropped, (layers, B, K, S)."""
    with catch_scores(press) as caught:
        evicted(model, press, ids, **stock)
    for scored in caught:
        assert scored.scores.dtype == torch.float32 and scored.scores.isfinite().all()
        assert all(len(set(row.tolist())) == row.numel() for row in scored.scores.flatten(0, 1))
    return torch.stack([scored.scores.argsort(-1) for scored in caught])


@torch.no_grad()
def test_every_decoded_token_draws_anew(random_model: Build) -> None:
    model = random_model().train()
    press = blocks(0.0, protect_recent=0, block_size=2)
    cache, found = DynamicCache(), []
    with DecodingPress(press, compression_interval=4, target_size=20)(model), catch_scores(press) as caught:
        for position, token in enumerate(context()[:, :40].split(1, dim=1)):
            model.model(input_ids=token, past_key_values=cache, cache_position=torch.tensor([position]), use_cache=True)
            if position % 4 == 0 and position > 20:  # the first token is a prefill
                found.append(cache.layers[0].keys.shape[2])
    assert found and set(found) == {20}
    drawn = [scored.scores[0, 0].tolist() for scored in caught if scored.scores.shape[-1] == 24]
    assert len(drawn) > 4 and len(set(map(tuple, drawn))) == len(drawn)


def test_gradients_equal_those_of_a_dense_pass_that_hides_what_went(random_model: Build) -> None:
    model, press, more = random_model().train(), blocks(shared=True), context(5, tokens=8)
    positions = prefill(model, context(), press, request=Request(contexts=True)).positions[0][:, 0]
    keeping = torch.zeros(2, CONTEXT, dtype=torch.bool).scatter(1, positions, True)
    evicting = RealEviction(press)

    def gradients(hidden: Tensor) -> list[Tensor]:
        weight = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
        loss = (hidden * weight).sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.model.parameters()))]

    hidden = evicting(model, context(), more, compression_ratio=RATIO, step=0).hidden
    visible = torch.ones(CONTEXT + 8, CONTEXT + 8).tril().bool().repeat(2, 1, 1)
    visible[:, CONTEXT:, :CONTEXT] &= keeping[:, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    dense = model.model(torch.cat([context(), more], 1), attention_mask=mask, use_cache=False).last_hidden_state
    for found, expected in zip(gradients(hidden), gradients(dense[:, CONTEXT:]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@both
def test_bfloat16_draws_the_same(random_model: Build, build: Callable[..., Any]) -> None:
    half = order_of_keys(random_model().bfloat16(), build(), context())
    assert torch.equal(half, order_of_keys(random_model(), build(), context()))


@both
@pytest.mark.parametrize("rotated", [False, True])
def test_every_chunk_of_a_prefill_draws_anew(
    random_model: Build, build: Callable[..., Any], rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press, firsts = random_model().train(), build(), []
    known = SpanDropoutPress.uniform

    def uniform(self: SpanDropoutPress, shown: Shown, *args: Any) -> Tensor:
        firsts.append((shown.layer, *shown.firsts))
        return known(self, shown, *args)

    monkeypatch.setattr(SpanDropoutPress, "uniform", uniform)
    outer = KeyRerotationPress(press) if rotated else press
    ids = context(tokens=120)
    evicting = RealEviction(outer, chunk_tokens=20, budget=20)
    result = evicting(model, ids, context(5, tokens=8), compression_ratio=RATIO, step=1)
    assert result.kept_share == 20 / 120
    # The first chunk fits; from the second on, chunks begin at true positions, though keys are turned to 0..39.
    expected = {(layer, start, start) for layer in range(2) for start in range(0, 120, 20)}
    assert set(firsts) == expected
    result.hidden.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.parameters() if p.grad is not None)


def test_defaults_are_those_of_the_seed() -> None:
    press = BlockDropoutPress()
    assert (press.block_size, press.protect_start, press.protect_recent) == (64, 4, 64)
