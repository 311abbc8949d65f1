"""The name by which attention layers get their cache: transformers 5.24 calls ``cache`` what kvpress 0.5.5 reads."""

from collections.abc import Mapping
from typing import Any


def with_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an attention layer's keywords with the cache as ``past_key_values``, whatever transformers calls it."""
    return {"past_key_values": kwargs["cache"], **kwargs} if "cache" in kwargs else dict(kwargs)
