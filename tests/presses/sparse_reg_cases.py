"""Helpers for the tests of SparseRegPress."""

from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.presses.sparse_reg import SparseRegPress

LENGTH, WINDOW, SINKS = 24, 5, 2
KINDS = ["entropy", "l1"]


def press_with(press: BasePress | None = None, **settings: Any) -> SparseRegPress:
    return SparseRegPress(press, **({"window_size": WINDOW, "sinks": SINKS} | settings))


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(0))


def losses(model: PreTrainedModel, press: BasePress, **settings: Any) -> dict[str, list[Tensor]]:
    press_context = prefill(model.train(), ids(), press, **settings).press_context
    assert press_context is not None
    return press_context.losses


def attentions_of(model: PreTrainedModel, mask: Tensor | None = None) -> list[Tensor]:
    model.eval().set_attn_implementation("eager")
    found = model.model(ids(), attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return list(found)
