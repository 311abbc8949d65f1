"""The name by which attention layers get their cache: kvpress 0.5.5 reads ``past_key_values``."""

from collections.abc import Mapping
from typing import Any

OTHERS = ("cache", "past_key_value")
"""Names in transformers 5.24, and in single models of 5.2 (AFMoE)."""


def with_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an attention layer's keywords with the cache as ``past_key_values``, whatever the model calls it."""
    found = next((kwargs[name] for name in OTHERS if name in kwargs), None)
    return dict(kwargs) if found is None else {"past_key_values": found, **kwargs}
