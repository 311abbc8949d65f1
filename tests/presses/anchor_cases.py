"""Tokens, anchors and reference loops for the tests of AnchorPress."""

from functools import cache
from typing import Any

import pytest
import torch
from kvpress import (
    BasePress,
    CriticalKVPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses.anchor import AnchorPress
from sparsekv_pl.presses.caught_scores import catch_scores

CONTEXT, CHUNK = 48, 12
SPECIAL, PUNCTUATION = (0, 1), (2, 3)
FEW = Anchors(sinks=2, recent=4)

inner_presses = pytest.mark.parametrize(
    "inner",
    [
        KeyDiffPress,
        KnormPress,
        lambda: SnapKVPress(window_size=6),
        lambda: CriticalKVPress(SnapKVPress(window_size=6)),
        lambda: LagKVPress(lag_size=8, n_sink=3),
        lambda: StreamingLLMPress(n_sink=3),
    ],
    ids=["KeyDiff", "Knorm", "SnapKV", "CriticalKV", "LagKV", "StreamingLLM"],
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """64 ids: two special tokens, a full stop, a comma, and words."""
    from tokenizers import Tokenizer, models

    tokens = ["<s>", "</s>", ".", ",", *(f"word{number}" for number in range(4, 64))]
    raw = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<s>")


def anchor(ratio: float = 0.5, inner: ScorerPress | None = None, anchors: Anchors = FEW) -> AnchorPress:
    press = AnchorPress(ratio, KeyDiffPress() if inner is None else inner, anchors)
    press.tokenizer = tokenizer()
    return press


def context(tokens: int = CONTEXT, rows: int = 2) -> Tensor:
    """Words, none twice in a row, and in each row special tokens and punctuation at places of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([4 + torch.randperm(60, generator=generator)[:tokens] for _ in range(rows)])
    for row in range(rows):
        ids[row, 9 + row], ids[row, 21], ids[row, 30 - row], ids[row, 38] = 0, 2, 1, 3
    return ids


@torch.no_grad()
def scores_of(model: PreTrainedModel, press: ScorerPress, **inputs: Any) -> list[Tensor]:
    """Return the scores of ``press`` in every layer of one forward."""
    with catch_scores(press) as caught, press(model):
        model.model(**({"input_ids": context()} | inputs), past_key_values=DynamicCache())
    return [scored.scores for scored in caught]


def ranked(ids: list[int], positions: list[int], anchors: Anchors, seen: int) -> list[int]:
    """Return indices into ``positions`` of the anchors in the order of the class's rule, in plain loops."""
    token_of = dict(enumerate(ids))
    newest_first = sorted(range(len(positions)), key=lambda index: -positions[index])
    sinks = [index for index in reversed(newest_first) if positions[index] < anchors.sinks]
    recent = [index for index in newest_first if positions[index] >= seen - anchors.recent]
    special = [i for i in newest_first if anchors.special and token_of[positions[i]] in SPECIAL]
    punctuation = [i for i in newest_first if anchors.punctuation and token_of[positions[i]] in PUNCTUATION]
    return list(dict.fromkeys([*sinks, *recent, *special, *punctuation]))


def first_by_loops(scores: Tensor, ids: list[int], anchors: Anchors) -> list[int]:
    """Return the keys of one row and head that stay first: anchors, then those that the scorer itself pins, (S,)."""
    tops = (scores == scores.max()).nonzero()[:, 0].flip(0).tolist()
    by_rule = tops if len(tops) > 1 else []
    return list(dict.fromkeys([*ranked(ids, list(range(len(ids))), anchors, len(ids)), *by_rule]))


def check_against_loops(model: PreTrainedModel, press: AnchorPress, inner: ScorerPress) -> None:
    ids, budget = context(), max(1, int(CONTEXT * (1 - press.compression_ratio)))
    full = prefill(model, ids, None).cache
    prefilled = prefill(model, ids, press, request=Request(contexts=True))
    for layer, scores in enumerate(scores_of(model, inner)):
        positions, cached = prefilled.positions[layer], prefilled.cache.layers[layer]
        assert positions.shape == (2, 2, budget)
        for name in ("keys", "values"):
            index = positions[..., None].expand_as(cached.keys)
            assert torch.equal(getattr(cached, name), getattr(full.layers[layer], name).gather(2, index))
        for row in range(2):
            for head in range(2):
                own, kept = scores[row, head], positions[row, head]
                first = first_by_loops(own, ids[row].tolist(), press.anchors)
                assert set(first[:budget]) <= set(kept.tolist())
                rest = sorted((float(own[key]) for key in range(CONTEXT) if key not in first), reverse=True)
                filled = sorted((float(own[key]) for key in kept.tolist() if key not in first), reverse=True)
                assert filled == rest[: max(0, budget - len(first))]  # by value: LagKV's scores are ranks, which tie


@torch.no_grad()
def pressed(model: PreTrainedModel, press: BasePress, rows: int = 2) -> DynamicCache:
    cache = DynamicCache()
    with press(model):
        model.model(context()[:rows], past_key_values=cache)
    return cache
