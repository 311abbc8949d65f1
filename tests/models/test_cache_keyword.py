"""Presses find a layer's cache under the name of transformers 5.2 and under that of 5.24."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from sparsekv_pl.eviction.continuation import Continuation
from sparsekv_pl.eviction.prefill import ChunkedPrefill, prefill
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.eviction.while_decoding import Decoding


class Renamed(Qwen3Attention):
    """An attention that is called with ``cache``, as in transformers 5.24."""

    def forward(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, past_key_values=cache, **kwargs)


@torch.no_grad()
def test_a_layer_that_calls_its_cache_otherwise_is_evicted_alike(
    random_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(2, 34)[None]

    def kept(model: PreTrainedModel) -> list[torch.Tensor]:
        caches = [prefill(model, ids, KeyDiffPress(0.5), 16).cache, RecordedPrefill(model, ids).evicted(None).cache]
        filling = ChunkedPrefill(model, KeyDiffPress(0.5), ids.shape[1], request=Request(contexts=True))
        filling.run(ids)
        read = Continuation(filling, Decoding(8, budget=16), 0.5, ids.shape[1]).read(ids)
        return [read, *(layer.keys for cache in caches for layer in cache.layers)]

    model = random_model()
    expected = kept(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.__class__ = Renamed
        called = torch.nn.Module.__call__

        def call(self: Any, *args: Any, past_key_values: Any = None, _called: Any = called, **kwargs: Any) -> Any:
            return _called(self, *args, cache=past_key_values, **kwargs)

        monkeypatch.setattr(Renamed, "__call__", call)
    for found, other in zip(kept(model), expected, strict=True):
        assert torch.equal(found, other)
