"""Whole spans are dropped, only in training, by draws that depend only on the seed, the step and the position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.presses.span_cases import CONTEXT, Build, blocks, both, context, kept, spans_in, variable


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
