"""Presses that record their inputs, and a context whose tokens identify their positions."""

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

CONTEXT, CHUNK = 48, 12


@dataclass
class Call:
    """A press's inputs at one layer of one chunk."""

    layer: int
    tokens: KeyTokens | None
    press_context: PressContext | None
    real: Tensor | None
    values: Tensor


@dataclass
class Blind(ScorerPress):
    """Score each KV head differently, and record the inputs."""

    calls: list[Call] = field(default_factory=list)

    def score(self, module: Any, _: Any, keys: Tensor, values: Tensor, __: Any, kwargs: Any) -> Tensor:
        real = real_keys(keys, kwargs)
        context = press_context_in(kwargs)
        call = Call(module.layer_idx, key_tokens(module, keys, kwargs), context, real, values.clone())
        self.calls.append(call)
        return values.sum(-1)


@dataclass
class Reads(ReadsTokens, Blind):
    """The same, with token ids."""


def context() -> Tensor:
    """Make rows of distinct tokens, so that a layer-0 value identifies its token."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(64, generator=generator)[:CONTEXT] for _ in range(2)])


@torch.no_grad()
def pressed(model: PreTrainedModel, press: BasePress, **inputs: Any) -> DynamicCache:
    """Evict as kvpress's pipeline does, in one forward of the decoder."""
    cache = DynamicCache()
    with press(model):
        model.model(**({"input_ids": context()} | inputs), past_key_values=cache)
    return cache


@torch.no_grad()
def check(model: PreTrainedModel, call: Call, seen: int = CONTEXT) -> None:
    """Check that the ids are those seen so far, and that every layer-0 key has the token of its value."""
    assert call.tokens is not None
    assert torch.equal(call.tokens.ids, context()[:, :seen])
    assert call.tokens.positions.shape == call.values.shape[:3]
    if call.layer == 0:
        full = prefill(model, context(), None).cache.layers[0].values
        expected = full.gather(2, call.tokens.positions[..., None].expand_as(call.values))
        torch.testing.assert_close(call.values, expected)
        ids = context()[:, None].expand(-1, full.shape[1], -1).gather(-1, torch.cdist(call.values, full).argmin(-1))
        assert torch.equal(call.tokens.at_keys(context()[:, :seen]), ids)
