"""Presses that note what they are told, and a context whose tokens tell where they stand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import (
    BasePress,
    ScorerPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.presses.key_tokens import KeyTokens, ReadsTokens, key_tokens, real_keys
from sparsekv_pl.presses.press_context import PressContext, press_context_in

Build = Callable[..., PreTrainedModel]
CONTEXT, CHUNK = 48, 12


@dataclass
class Noted:
    """What a press was told at one layer of one chunk."""

    layer: int
    tokens: KeyTokens | None
    press_context: PressContext | None
    real: Tensor | None
    values: Tensor


@dataclass
class Blind(ScorerPress):
    """Scores each KV head by something else, and notes what it is told."""

    noted: list[Noted] = field(default_factory=list)

    def score(self, module: Any, _: Any, keys: Tensor, values: Tensor, __: Any, kwargs: Any) -> Tensor:
        real = real_keys(keys, kwargs)
        context = press_context_in(kwargs)
        noted = Noted(module.layer_idx, key_tokens(module, keys, kwargs), context, real, values.clone())
        self.noted.append(noted)
        return values.sum(-1)


@dataclass
class Reads(ReadsTokens, Blind):
    """The same, and is told the ids."""


def context() -> Tensor:
    """No token twice in a row, so that a layer-0 value tells which token it came from."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(64, generator=generator)[:CONTEXT] for _ in range(2)])


@torch.no_grad()
def pressed(model: PreTrainedModel, press: BasePress, **inputs: Any) -> DynamicCache:
    """As kvpress's pipeline uses a press: one forward of the decoder."""
    cache = DynamicCache()
    with press(model):
        model.model(**({"input_ids": context()} | inputs), past_key_values=cache)
    return cache


@torch.no_grad()
def check(model: PreTrainedModel, noted: Noted, seen: int = CONTEXT) -> None:
    """The ids are those seen so far, and the token of every layer-0 key is the one that its value was made from."""
    assert noted.tokens is not None
    assert torch.equal(noted.tokens.ids, context()[:, :seen])
    assert noted.tokens.positions.shape == noted.values.shape[:3]
    if noted.layer == 0:
        full = prefill(model, context(), None).cache.layers[0].values
        expected = full.gather(2, noted.tokens.positions[..., None].expand_as(noted.values))
        torch.testing.assert_close(noted.values, expected)
        ids = context()[:, None].expand(-1, full.shape[1], -1).gather(-1, torch.cdist(noted.values, full).argmin(-1))
        assert torch.equal(noted.tokens.at_keys(context()[:, :seen]), ids)
