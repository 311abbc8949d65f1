"""Applying an eviction: really shrinking the cache (real), or hiding keys in one pass (dropout)."""

from sparsekv_pl.eviction.interface import Evicted, EvictedContext, Eviction

__all__ = ["Evicted", "EvictedContext", "Eviction"]
