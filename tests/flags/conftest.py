"""The module that all flags are tried on."""

from collections.abc import Callable
from typing import Any

import pytest
from kvpress import SnapKVPress

from sparsekv_pl.eviction.chunked import ChunkedEviction
from sparsekv_pl.modules.eit import EITModule
from tests.tiny_training import MakeBackbone, adamw


@pytest.fixture
def module(tiny_backbone: MakeBackbone) -> Callable[..., EITModule]:
    """EITModule(**settings) of a tiny model under SnapKV."""

    def make(**settings: Any) -> EITModule:
        return EITModule(
            tiny_backbone(), ChunkedEviction(SnapKVPress(window_size=8)), **({"optimizer": adamw} | settings)
        )

    return make
