"""sparsekv_pl: train causal language models to survive the eviction of their KV cache."""

__version__ = "0.1.0"
