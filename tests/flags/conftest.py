"""The module that all flags are tried on."""

from collections.abc import Callable
from typing import Any

import pytest
from kvpress import SnapKVPress

from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, adamw


@pytest.fixture
def module(tiny_backbone: MakeBackbone) -> Callable[..., EITModule]:
    """EITModule(**settings) of a tiny model under SnapKV."""

    def make(**settings: Any) -> EITModule:
        eviction = RealEviction(SnapKVPress(window_size=8))
        made = EITModule(tiny_backbone(), eviction, **({"optimizer": adamw} | settings))
        made.compression_ratio = 0.5
        return made

    return make
