"""The name by which attention layers get their cache: transformers 5.24 calls ``cache`` what kvpress 0.5.5 reads."""

from collections.abc import Callable, Mapping
from typing import Any


def with_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an attention layer's keywords with the cache as ``past_key_values``, whatever transformers calls it."""
    return {"past_key_values": kwargs["cache"], **kwargs} if "cache" in kwargs else dict(kwargs)


def renamed(hook: Callable[..., Any], module: Any, inputs: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Call a press's ``forward_hook`` with the keywords that kvpress knows; for ``shadowed``."""
    return hook(module, inputs, with_cache(kwargs), output)
