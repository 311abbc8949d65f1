"""A context's cache after its prefill: what evictions return and continuations start from."""

from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.presses.press_context import PressContext


@dataclass
class Prefilled:
    """A context's cache, ready to be continued."""

    cache: DynamicCache
    next_position: int
    """RoPE position of the first token that follows: the context's length, unless the press re-rotated the keys."""
    selections: list[Selection]
    press_context: PressContext | None = None
    """What the press said besides; None without a press."""
    positions: dict[int, Tensor] = field(default_factory=dict)
    """layer -> (B, K, S) int64, the context positions of the kept keys; empty where they were not followed."""

    @property
    def mean_weight(self) -> float:
        """Of a kept pair: 1 unless a press fades pairs out in place of removing them."""
        faded = {} if self.press_context is None else self.press_context.key_log_weights
        if not faded:
            return 1.0
        return float(stacked([weights.detach().exp().mean() for weights in faded.values()]).mean())

    def copy(self) -> "Prefilled":
        """One to continue from, while this one stays as it is."""
        return replace(self, cache=copy_cache(self.cache))

    def branch(self) -> "Prefilled":
        """As ``copy``, for a continuation in training: it shares the memory, and gradients flow back into this one."""
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            assert layer.keys is not None and layer.values is not None
            cache.update(layer.keys, layer.values, index)
        return replace(self, cache=cache)


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """The same keys and values in memory of their own."""
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert layer.keys is not None and layer.values is not None
        copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied


def mean_length(cache: DynamicCache) -> float:
    """KV pairs per head that ``cache`` holds, averaged over layers."""
    return sum(cache.get_seq_length(layer) for layer in range(len(cache.layers))) / len(cache.layers)
