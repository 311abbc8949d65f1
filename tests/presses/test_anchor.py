"""Anchors stay, the scorer chooses the rest: exactly the budget, in every way that a press is used."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvpress import (
    KeyDiffPress,
    KnormPress,
    ScorerPress,
    SnapKVPress,
)
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.anchors import Anchors, table_for
from sparsekv_pl.objectives.score_alignment import key_logits
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.presses.caught_scores import pinned
from tests.presses.anchor_cases import (
    CHUNK,
    CONTEXT,
    FEW,
    anchor,
    check_against_loops,
    context,
    inner_presses,
    pressed,
    ranked,
    scores_of,
)
from tests.random_models import Build


@torch.no_grad()
@inner_presses
@pytest.mark.parametrize(("ratio", "training"), [(0.1, False), (0.5, True), (0.83, False), (0.9, True), (0.99, False)])
def test_what_stays_is_what_plain_loops_choose(
    random_model: Build, inner: Callable[[], ScorerPress], ratio: float, training: bool
) -> None:
    """Ten anchors of 48 tokens: from 0.83 on they do not all fit."""
    alone = inner()
    alone.compression_ratio = ratio
    check_against_loops(random_model().train(training), anchor(ratio, inner()), alone)


@torch.no_grad()
@pytest.mark.parametrize(
    "anchors",
    [
        Anchors(0, 0, False, False),
        Anchors(3, 0, False, False),
        Anchors(0, 5, False, False),
        Anchors(0, 0, True, False),
        Anchors(0, 0, False, True),
        Anchors(100, 3),
        Anchors(3, 100),
    ],
    ids=str,
)
def test_every_kind_of_anchor_alone_and_more_than_the_context_holds(random_model: Build, anchors: Anchors) -> None:
    check_against_loops(random_model(), anchor(0.6, KnormPress(), anchors), KnormPress(0.6))


def test_the_scores_are_the_inner_press_s_and_one_value_for_all_anchors(random_model: Build) -> None:
    model, ids = random_model(), context()
    press = anchor(0.5)
    mask = FEW.mask(ids, table_for(press.tokenizer, ids.device))
    for scores, inner in zip(scores_of(model, press), scores_of(model, KeyDiffPress(0.5)), strict=True):
        assert scores.dtype == torch.float32
        assert torch.equal(pinned(scores), mask[:, None].expand_as(scores))
        assert torch.equal(scores[~pinned(scores)], inner[~pinned(scores)])
        assert scores.max() > inner.max()


@pytest.mark.parametrize(("offset", "step"), [(0, 1), (3e4, 2**8), (-4e4, 2**8), (3e9, 2**25)])
def test_anchors_are_above_scores_that_a_coarse_dtype_could_not_tell_apart(offset: float, step: int) -> None:
    class Large(ScorerPress):
        def score(self, module: Any, hidden_states: Any, keys: Tensor, *_: Any) -> Tensor:  # noqa: ARG002
            return (offset + step * torch.arange(keys.shape[2])).expand(keys.shape[:3]).bfloat16()

    keys = torch.zeros(1, 1, 20, 4, dtype=torch.bfloat16)
    scores = anchor(0.5, Large(), Anchors(3, 0, False, False)).score(torch.nn.Module(), keys, keys, keys, None, {})
    assert scores.dtype == torch.float32
    assert len(set(scores[0, 0, 3:].tolist())) == 17
    assert scores[0, 0, :3].unique().numel() == 1
    assert (scores[..., :3] > scores[..., 3:].amax()).all()


class PinsSix(ScorerPress):
    """Pins the last six keys, and in each row on its own scale."""

    def score(self, module: Any, hidden_states: Any, keys: Tensor, *_: Any) -> Tensor:  # noqa: ARG002
        places = torch.arange(keys.shape[2]).clamp(max=keys.shape[2] - 6).float()
        return (places + 100 * torch.arange(len(keys))[:, None, None]).expand(keys.shape[:3])


def test_what_the_scorer_pins_comes_after_the_anchors_in_each_row_by_itself() -> None:
    """Two sinks, then the newest four of six pinned keys: in the row with the lower scores as well."""
    press, keys = anchor(1 - 6.5 / 20, PinsSix(), Anchors(2, 0, False, False)), torch.zeros(2, 2, 20, 4)
    scores = press.score(torch.nn.Module(), keys, keys, keys, None, {})
    for row in range(2):
        kept = scores[row].topk(6, dim=-1).indices.sort(dim=-1).values
        assert kept.tolist() == [[0, 1, 16, 17, 18, 19]] * 2


def test_padding_that_the_scorer_pins_takes_no_place() -> None:
    """Of the six pinned keys the last three are padding in row 1; the real ones stay."""
    press, keys = anchor(1 - 5.5 / 20, PinsSix(), Anchors(2, 0, False, False)), torch.zeros(2, 2, 20, 4)
    mask = torch.ones(2, 20)
    mask[1, -3:] = 0
    scores = press.score(torch.nn.Module(), keys, keys, keys, None, {"attention_mask": mask})
    kept = scores.topk(5, dim=-1).indices.sort(dim=-1).values
    assert kept.tolist() == [[[0, 1, 17, 18, 19]] * 2, [[0, 1, 14, 15, 16]] * 2]


def test_the_scorer_is_shown_the_model_too(random_model: Build) -> None:
    shown: list[PreTrainedModel] = []

    class Prepares(KnormPress):
        def post_init_from_model(self, model: PreTrainedModel) -> None:
            shown.append(model)

    model = random_model()
    pressed(model, anchor(0.5, Prepares()))
    assert shown == [model]


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("inner", [KeyDiffPress, lambda: SnapKVPress(window_size=6)], ids=["KeyDiff", "SnapKV"])
def test_anchors_of_earlier_chunks_stay_anchors(
    random_model: Build, inner: Callable[[], ScorerPress], ratio: float
) -> None:
    press, ids = anchor(ratio, inner()), context()
    with torch.no_grad():
        prefilled = prefill(random_model(), ids, press, CHUNK, request=Request(scores=True))
    assert len(prefilled.selections) == 8
    for chunk, (layer, selection) in enumerate((s.layer, s) for s in prefilled.selections):
        assert selection.positions is not None
        seen = CHUNK * (chunk // 2 + 1)
        held = prefilled.selections[chunk + 2].positions if chunk < 6 else prefilled.positions[layer]
        assert held is not None
        for row in range(2):
            for head in range(2):
                positions = selection.positions[row, head].tolist()
                first = [positions[i] for i in ranked(ids[row].tolist(), positions, FEW, seen)]
                kept = [place for place in held[row, head].tolist() if place < seen]
                assert len(kept) == int(seen * (1 - ratio))
                assert set(first[: len(kept)]) <= set(kept)
    if ratio == 0.5:  # no chunk has more anchors than it may keep
        every = {0, 1, 9, 21, 30, 38, 44, 45, 46, 47}
        assert all(every <= set(head) for layer in prefilled.positions.values() for head in layer[0].tolist())


@pytest.mark.parametrize("inner", [KeyDiffPress, lambda: SnapKVPress(window_size=6)], ids=["KeyDiff", "SnapKV"])
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_the_selection_loss_is_the_inner_press_s_over_what_is_no_anchor(
    random_model: Build, inner: Callable[[], ScorerPress], ratio: float
) -> None:
    """At 0.9 only sinks and two recent tokens fit: of the others, those that SnapKV pins count as worth nothing."""
    model, press, ids = random_model(), anchor(ratio, inner()), context()
    mass = torch.rand(2, 2, CONTEXT, generator=torch.Generator().manual_seed(1))
    stay = torch.zeros(2, 1, CONTEXT, dtype=torch.bool)
    for row in range(2):
        first = ranked(ids[row].tolist(), list(range(CONTEXT)), FEW, CONTEXT)
        stay[row, 0, first[: int(CONTEXT * (1 - ratio))]] = True
    inner_scores = scores_of(model, replace(inner(), compression_ratio=ratio))
    for layer, (scores, alone) in enumerate(zip(scores_of(model, press), inner_scores, strict=True)):
        loss = SelectionLoss(heads="equal")([(Selection(layer, "a", scores.requires_grad_()), mass)])["a"]
        by_rule = pinned(alone)
        free = ~stay & (torch.arange(CONTEXT) >= 4)
        if ratio == 0.5:
            free = free & ~by_rule
        target = torch.where(free, mass, 0)
        target = target / target.sum(-1, keepdim=True)
        shares = key_logits(alone.masked_fill(by_rule, 0), free.expand_as(alone)).log_softmax(-1)
        expected = -(target * torch.where(free, shares, 0)).sum(-1).mean()
        torch.testing.assert_close(loss, expected)
