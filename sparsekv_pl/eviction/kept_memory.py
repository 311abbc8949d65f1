"""Measure an evicted cache: KV pairs and bytes, and whether memory was freed or pairs were only hidden."""

from dataclasses import dataclass

from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.cache_layers import tensors_of
from sparsekv_pl.eviction.kept_positions import masked_keys
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation, quantised_bytes
from sparsekv_pl.models.layer_kinds import evicted_layers


@dataclass(frozen=True)
class KeptMemory:
    """KV pairs and bytes of one cache."""

    kept_pairs: float
    """KV pairs that attention can still see, a mean over rows, KV heads and the layers in which presses evict."""
    kv_bytes: int
    """Bytes that the keys, values and states of all layers hold in memory, all rows together."""
    freed: bool
    """False where a head-wise press hides pairs that stay in memory."""


def kept_memory(
    model: PreTrainedModel, cache: DynamicCache, quantisation: PairQuantisation | None = None
) -> KeptMemory:
    """Measure ``cache``, just evicted under ``model``; shared storage is counted once.

    With ``quantisation`` the bytes are those of its pairs packed.
    """
    storages, pairs, heads = {}, 0, 0
    evicted = evicted_layers(model.config)
    for index, layer in enumerate(cache.layers):
        if index in evicted:
            assert layer.keys is not None
            rows = layer.keys.shape[0] * layer.keys.shape[1]
            heads, pairs = heads + rows, pairs + rows * layer.keys.shape[2]
        for tensor in tensors_of(layer).values():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    hidden = sum(len(mask[0]) for mask in masked_keys(model) if mask is not None)
    held = sum(storages.values()) if quantisation is None else quantised_bytes(cache, quantisation, evicted)
    return KeptMemory((pairs - hidden) / heads, held, hidden == 0)
