"""A context's cache after its prefill, from which continuations start."""

from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.cache_layers import mapped
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
    """The scores by which the press selected; empty unless requested."""
    press_context: PressContext | None = None
    """Log-weights and losses from the press; None without a press."""
    hidden: list[Tensor] = field(default_factory=list)
    """(B, c, E) of the first chunk, if requested, and of each chunk after it, if requested."""
    positions: dict[int, Tensor] = field(default_factory=dict)
    """layer -> (B, K, S) int64, the context positions of the kept keys; empty if they were not tracked."""
    uncut: DynamicCache | None = None
    """The cache as it was before the eviction of a single chunk; None unless requested."""

    @property
    def mean_weight(self) -> float:
        """Mean weight of a kept pair: 1 unless the press fades pairs out instead of removing them."""
        faded = {} if self.press_context is None else self.press_context.key_log_weights
        if not faded:
            return 1.0
        return float(stacked([weights.detach().exp().mean() for weights in faded.values()]).mean())

    def copy(self) -> "Prefilled":
        """Return a copy with its own memory, which can be continued without changing this one."""
        return replace(self, cache=copy_cache(self.cache))

    def branch(self) -> "Prefilled":
        """Return a copy for a continuation in training: it shares memory with this one and passes gradients to it."""
        return replace(self, cache=mapped(self.cache, lambda tensor: tensor))


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """Return a cache with clones of the same tensors."""
    return mapped(cache, Tensor.clone)
