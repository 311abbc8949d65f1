"""Profiles of planted attention contain what was planted, and anchor rules follow from them as documented."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekv_pl.analysis.anchor_profile import (
    GROUPS,
    LEADING,
    AnchorProfile,
    groups_of,
    position_edges,
    profile_records,
    recommended,
)
from sparsekv_pl.analysis.token_types import TYPES
from sparsekv_pl.attention.received_attention import ReceivedAttention
from sparsekv_pl.models.anchors import Anchors, AnchorTable

LENGTH = 96
SPECIAL, PUNCTUATION, WORD = (TYPES.index(name) for name in ("special", "punctuation", "content"))


def kinds(length: int = LENGTH, rows: int = 2) -> Tensor:
    """(B, S): mostly content, punctuation at every fifth place, special at every thirteenth."""
    places = torch.arange(length).expand(rows, -1) + torch.arange(rows)[:, None]
    types = torch.where(places % 5 == 4, PUNCTUATION, WORD)
    return torch.where(places % 13 == 6, SPECIAL, types)


def attend(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, S, S), of (B, H, S, D) and (B, H, S, D) with scaling 1."""
    length = query.shape[2]
    logits = (query @ key.transpose(2, 3)).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1)


def planted(weights: Tensor, recency: float = 0.0) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, 1, S, 1) whose attention is in proportion to ``weights`` (B, S) times exp(recency * k).

    A key that is nearer by one is then exp(recency) times as heavy, whichever query looks.
    """
    logits = weights.log() + recency * torch.arange(weights.shape[1])
    return torch.ones(*weights.shape, 1)[:, None], logits[:, None, :, None]


def profile_of(types: Tensor, *layers: tuple[Tensor, Tensor]) -> AnchorProfile:
    observer = ReceivedAttention(groups_of(types), GROUPS)
    for layer, (query, key) in enumerate(layers):
        observer(layer, query, key, key)
    return AnchorProfile.of(json.loads(json.dumps(profile_records(observer, types, 0.8))))


def weights(
    sink: float = 1.0, sinks: int = 0, punctuation: float = 1.0, special: float = 1.0, length: int = LENGTH
) -> Tensor:
    found = torch.ones(2, length)
    found[kinds(length) == PUNCTUATION] = punctuation
    found[kinds(length) == SPECIAL] = special
    found[:, :sinks] = sink
    return found


def test_attention_spread_evenly_is_once_chance_everywhere() -> None:
    profile = profile_of(kinds(), planted(weights()))
    first = profile.sinks(4)
    chosen = [profile.types("punctuation"), profile.types("special") & ~first, first, profile.recent(8)]
    for cells in chosen:
        assert profile.portion(cells).times_chance == pytest.approx(1, abs=1e-4)
        portion = profile.portion(cells & ~first, ~first)
        assert portion.times_chance is None or portion.times_chance == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(profile.position_mass.mean(1), profile.position_chance, rtol=1e-4)
    assert profile.carrying.tolist() == [[pytest.approx(profile.carrying_by_chance)]]
    everything = profile.portion(profile.everything)
    assert everything.attention == everything.tokens == pytest.approx(1)


def test_portions_equal_a_full_matrix() -> None:
    types = kinds()
    query, key = planted(weights(sink=30, sinks=2, punctuation=5), recency=0.05)
    profile = profile_of(types, (query, key), planted(weights()))
    attention = (attend(query, key) + attend(*planted(weights())))[:, 0] / 2
    visible = torch.ones(LENGTH, LENGTH).tril()
    even = visible / visible.sum(-1, keepdim=True)
    far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)) >= 16
    chosen = (types == PUNCTUATION)[:, None] & far & (torch.arange(LENGTH) >= 4)
    portion = profile.portion(profile.types("punctuation") & ~profile.recent(16) & ~profile.sinks(4))
    assert portion.attention == pytest.approx(float((attention * chosen).sum() / (2 * LENGTH)), rel=1e-4)
    assert portion.tokens == pytest.approx(float((even * chosen).sum() / (2 * LENGTH)), rel=1e-4)
    assert portion.per_token == pytest.approx(float((attention * chosen).sum() / (visible * chosen).sum()), rel=1e-4)
    assert portion.times_chance == pytest.approx(portion.attention / portion.tokens)
    first = attend(query, key)[:, 0, :, :2].sum() / (2 * LENGTH)
    assert profile.by_layer(profile.sinks(2))[0] == pytest.approx(float(first), rel=1e-4)


@pytest.mark.parametrize(
    "anchors",
    [
        Anchors(),
        Anchors(1, 8, False, True),
        Anchors(0, 0, True, False),
        Anchors(16, 1, False, False),
        Anchors(2, 128, False, False),
    ],
    ids=str,
)
def test_what_anchors_keep_is_what_their_mask_keeps(anchors: Anchors) -> None:
    types = kinds()
    query, key = planted(weights(sink=30, sinks=2, punctuation=5), recency=0.05)
    profile, attention = profile_of(types, (query, key)), attend(query, key)[:, 0]
    table = AnchorTable(*(torch.arange(len(TYPES)) == kind for kind in (SPECIAL, PUNCTUATION)))
    masks = [pad(anchors.mask(types[:, : q + 1], table), (0, LENGTH - q - 1)) for q in range(LENGTH)]
    portion = profile.portion(profile.kept(anchors))
    mass = sum(float((attention[:, q] * mask).sum()) for q, mask in enumerate(masks))
    tokens = sum(float(mask.sum()) / (q + 1) for q, mask in enumerate(masks))
    assert portion.attention == pytest.approx(mass / (2 * LENGTH), rel=1e-4)
    assert portion.tokens == pytest.approx(tokens / (2 * LENGTH), rel=1e-4)
    assert profile.tokens_kept(anchors) == float(masks[-1].sum()) / 2


@pytest.mark.parametrize(
    ("plant", "recency", "wanted"),
    [
        ({"sink": 60, "sinks": 3, "punctuation": 8}, 0.0, {"sinks": 3, "special": False, "punctuation": True}),
        ({"sink": 60, "sinks": 1, "special": 8}, 0.0, {"sinks": 1, "special": True, "punctuation": False}),
        ({"punctuation": 0.1}, 0.0, {"sinks": 0, "special": False, "punctuation": False}),
        # Of exp(-d / 10) half is nearer than 7 tokens; the next power of two is 8.
        ({"punctuation": 4}, 0.1, {"sinks": 0, "recent": 8, "special": False, "punctuation": True}),
        ({}, 0.5, {"sinks": 0, "recent": 2, "special": False, "punctuation": False}),
    ],
)
def test_the_rule_finds_what_was_planted(plant: dict[str, Any], recency: float, wanted: dict[str, Any]) -> None:
    rule = recommended(profile_of(kinds(), planted(weights(**plant), recency)))
    assert {name: getattr(rule.anchors, name) for name in wanted} == wanted
    assert set(rule.reasons) == {"sinks", "recent", "special", "punctuation"}


@pytest.mark.parametrize(("planted_sinks", "found"), [(12, 12), (16, LEADING), (20, LEADING)])
def test_sinks_are_counted_as_far_as_positions_are_told_apart(planted_sinks: int, found: int) -> None:
    heavy = weights(sink=1e4, sinks=planted_sinks, length=400)
    assert recommended(profile_of(kinds(400), planted(heavy))).anchors.sinks == found


def test_the_rules_settings_are_what_it_asks_for() -> None:
    profile = profile_of(kinds(), planted(weights(punctuation=3), recency=0.1))
    assert recommended(profile, threshold=1.5).anchors.punctuation
    assert not recommended(profile, threshold=4.0).anchors.punctuation
    recents = [recommended(profile, recent_mass=share).anchors.recent for share in (0.05, 0.5, 0.9, 1.0)]
    assert recents == sorted(recents) and recents[0] <= 2 and recents[-1] >= LENGTH
    for share, recent in zip((0.05, 0.5, 0.9), recents, strict=False):
        held = dict(profile.held(profile.everything))
        assert held[recent] >= share > held.get(recent // 2, 0)


def test_a_type_that_does_not_occur_keeps_the_default() -> None:
    types = torch.full((2, LENGTH), WORD)
    profile = profile_of(types, planted(torch.ones(2, LENGTH)))
    rule = recommended(profile)
    assert rule.anchors.special == Anchors().special and rule.anchors.punctuation == Anchors().punctuation
    assert "the default" in rule.reasons["special"]
    none = profile.portion(profile.types("special"))
    assert (none.attention, none.tokens, none.per_token, none.times_chance) == (0, 0, None, None)


def test_windows_of_several_lengths_are_pooled() -> None:
    def records(length: int) -> Sequence[dict[str, Any]]:
        types = kinds(length, 1)
        observer = ReceivedAttention(groups_of(types), GROUPS)
        query, key = planted(torch.ones(1, length))
        observer(0, query, key, key)
        return profile_records(observer, types, 0.8)

    short, long = records(9), records(40)
    pooled, alone = AnchorProfile.of([*short, *long]), AnchorProfile.of(long)
    assert pooled.edges == alone.edges and pooled.positions == alone.positions
    np.testing.assert_array_equal(pooled.mass[1:], alone.mass)
    assert pooled.mass[0].sum() == pytest.approx(9, rel=1e-4)
    assert pooled.portion(pooled.types("punctuation")).times_chance == pytest.approx(1, abs=1e-4)
    assert pooled.last.sum((1, 2, 3)).tolist() == [9, 40]


def test_edges_of_positions() -> None:
    assert position_edges(5) == [0, 1, 2, 3, 4, 5]
    assert position_edges(100) == [*range(LEADING + 1), 32, 64, 128]


def test_too_many_sinks_and_missing_edges_are_refused() -> None:
    profile = profile_of(kinds(), planted(weights()))
    with pytest.raises(ValueError, match="17 sinks: only the first 16"):
        profile.sinks(17)
    with pytest.raises(ValueError, match="recent=48 is not an edge"):
        profile.recent(48)
