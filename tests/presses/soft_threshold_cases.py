"""Inputs and references for the tests of SoftThresholdPress."""

from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.presses.press_context import PressContext
from sparsekv_pl.presses.soft_threshold import SoftThresholdPress

LENGTH, WINDOW, SINKS = 24, 4, 2


def press_with(ratio: float = 0.5, **settings: Any) -> SoftThresholdPress:
    return SoftThresholdPress(ratio, **({"window_size": WINDOW, "sinks": SINKS} | settings))


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def press_context_of(model: PreTrainedModel, press: BasePress, context: Tensor | None = None) -> PressContext:
    press_context = prefill(model.train(), ids() if context is None else context, press).press_context
    assert press_context is not None
    return press_context


@torch.no_grad()
def received(model: PreTrainedModel, context: Tensor) -> list[Tensor]:
    """Compute the attention that keys receive in each layer, (B, K, S), from full attention matrices."""
    model.eval().set_attn_implementation("eager")
    attentions = model.model(context, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [
        attention[:, :, -WINDOW:].mean(2).unflatten(1, (2, 2)).mean(2) * context.shape[1] for attention in attentions
    ]


def protected(length: int = LENGTH) -> Tensor:
    index = torch.arange(length)
    return (index < SINKS) | (index >= length - WINDOW)
