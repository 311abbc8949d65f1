"""Tiny models in use, and a document that they read."""

from collections.abc import Callable

import pytest

from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.usage.loaded_model import LoadedModel


@pytest.fixture(scope="session")
def model(tiny_backbone: Callable[..., Backbone]) -> LoadedModel:
    """The tiny Qwen3 in float32 without an adapter."""
    return LoadedModel(tiny_backbone("qwen3", lora=None))
