"""sparsekv_pl: train causal language models to survive the eviction of their KV cache.

Our presses are importable from here: ``from sparsekv_pl import AnchorPress``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if not name.endswith("Press"):
        raise AttributeError(f"module 'sparsekv_pl' has no attribute {name!r}")
    # Late: presses import kvpress, which takes seconds, and importing this package imports nothing else.
    presses = import_module("sparsekv_pl.presses")
    if name in presses.__all__:
        return getattr(presses, name)
    raise AttributeError(f"sparsekv_pl has no {name!r}; its presses are {presses.__all__}")
