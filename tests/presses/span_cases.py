"""Helpers for the tests of presses that drop spans."""

from typing import Any

import pytest
import torch
from kvpress import BasePress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.span_dropout import SpanDropoutPress
from sparsekv_pl.presses.variable_block import VariableBlockPress

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
