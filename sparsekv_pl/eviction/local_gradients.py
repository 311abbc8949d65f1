"""Gradients that stay in the layer: the context's pass then needs no backward, at the price of weaker training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.cache_layers import mapped
from sparsekv_pl.models.decoder import decoder_of


@dataclass(frozen=True)
class LocalGradients:
    """The steps and contexts whose gradients stay in the layer.

    There, each layer takes its input over the context without its history, and the continuation attends to kept pairs
    without theirs. A selection loss then trains a layer's own queries and keys, and the other losses train through the
    continuation alone. On all other steps gradients pass through the whole context.

    Parameters
    ----------
    through_every
        At every so many optimizer steps, from the first, gradients pass through the context; null: at none.
    above_tokens
        Through contexts of at most so many tokens gradients always pass.

    Raises
    ------
    ValueError
        If ``through_every`` is below 2 or ``above_tokens`` below 0.
    """

    through_every: int | None = None
    above_tokens: int = 0

    def __post_init__(self) -> None:
        if self.through_every is not None and self.through_every < 2:
            raise ValueError(
                f"local_gradients.through_every={self.through_every}: give 2 or more steps, null for none, or leave "
                "local_gradients out for gradients through every step"
            )
        if self.above_tokens < 0:
            raise ValueError(f"local_gradients.above_tokens={self.above_tokens}: give 0 or more tokens")

    def at(self, step: int, tokens: int) -> bool:
        """Return whether gradients stay in the layer for a context of ``tokens`` tokens at optimizer step ``step``."""
        through = self.through_every is not None and step % self.through_every == 0
        return tokens > self.above_tokens and not through


@contextmanager
def layers_apart(model: PreTrainedModel) -> Iterator[None]:
    """Detach the hidden states that enter each layer inside the block."""
    with ExitStack() as stack:
        for layer in decoder_of(model).layers:
            stack.callback(layer.register_forward_pre_hook(_without_history, with_kwargs=True).remove)
        yield


def detach(*caches: DynamicCache | None) -> None:
    """Detach the keys, values and states that ``caches`` hold; None stands for a cache that was not asked for."""
    for cache in caches:
        if cache is not None:
            cache.layers = mapped(cache, Tensor.detach).layers


def _without_history(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": hidden.detach()}
    return (hidden.detach(), *args[1:]), kwargs
