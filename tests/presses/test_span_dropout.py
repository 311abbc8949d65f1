"""Whole spans are dropped, only in training, by draws that depend only on the seed, the step and the position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, KeyRerotationPress
from torch import Tensor

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.presses.step_draws import draw
from sparsekv_pl.presses.traits import traits_of
from tests.presses.span_cases import CONTEXT, Build, blocks, both, context, evicted, kept, spans_in, variable


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
def test_the_draw_depends_on_seed_and_step_alone(random_model: Build, build: Callable[..., Any]) -> None:
    model = random_model()

    def at(step: int, **settings: Any) -> Tensor:
        press = build(**settings)
        draw(KeyRerotationPress(press), step)  # reaches it in a wrapper
        return kept(model, press, context())

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = at(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    press = build()
    for step in (7, 3):
        press.draw(step)
        again = kept(model, press, context())
    assert torch.equal(again, first)
    assert not torch.equal(at(4), first) and not torch.equal(at(3, seed=1), first)


@both
def test_layers_heads_and_rows_have_their_own_draws_unless_shared(
    random_model: Build, build: Callable[..., Any]
) -> None:
    model = random_model()
    own, shared = kept(model, build(), context()), kept(model, build(shared=True), context())
    assert len({tuple(mask.tolist()) for mask in own.view(-1, CONTEXT)}) == 8
    assert (shared == shared[:1, :, :1]).all()
    assert not torch.equal(shared[0, 0, 0], shared[0, 1, 0])


@both
def test_a_row_sees_no_other_row(random_model: Build, build: Callable[..., Any]) -> None:
    model, others = random_model(), context(1, rows=3)
    others[1] = context()[1]
    assert torch.equal(kept(model, build(), others)[:, 1], kept(model, build(), context())[:, 1])


@both
@pytest.mark.parametrize("budget", [1, 2, 5, 9])
def test_where_the_protected_do_not_fit_the_start_wins_then_the_newest(
    random_model: Build, build: Callable[..., Any], budget: int
) -> None:
    keeping = kept(random_model(), build(1 - (budget + 0.5) / CONTEXT), context())
    expected = torch.zeros(CONTEXT, dtype=torch.bool)
    expected[: min(budget, 3)] = True
    if budget > 3:
        expected[3 - budget :] = True
    assert (keeping == expected).all()


@both
def test_nothing_goes_in_evaluation_and_at_ratio_0(random_model: Build, build: Callable[..., Any]) -> None:
    model, press = random_model(), build()
    assert traits_of(press).only_trains and traits_of(AdaKVPress(press)).only_trains
    assert [layer.keys.shape[2] for layer in evicted(model, build(0.0), context()).layers] == [CONTEXT] * 2
    model.eval()
    full = prefill(model, context(), None).cache
    for left, whole in zip(prefill(model, context(), press).cache.layers, full.layers, strict=True):
        assert torch.equal(left.keys, whole.keys) and torch.equal(left.values, whole.values)
