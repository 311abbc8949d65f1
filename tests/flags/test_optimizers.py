"""A fused optimizer trains what a plain one does."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import AdamW

from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeData, MakeTrainer, trained


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_fused_optimizer_trains_as_a_plain_one(
    clip: float | None, module: Callable[..., EITModule], tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        found.append(module(optimizer=partial(AdamW, lr=1e-2, fused=fused)))
        tiny_trainer(max_steps=2, gradient_clip_val=clip).fit(found[-1], tiny_data())
    plain, fused_ = map(trained, found)
    assert plain.keys() == fused_.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused_[name], value, rtol=1e-4, atol=1e-6)
