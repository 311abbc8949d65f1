"""Applying an eviction: really shrinking the cache (chunked), or hiding keys in one pass (dropout)."""

from sparsekv_pl.eviction.result import Evicted, EvictedContext, Eviction

__all__ = ["Evicted", "EvictedContext", "Eviction"]
