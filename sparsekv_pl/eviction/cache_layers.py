"""The layers of a cache: keys and values, or what a layer without attention carries from token to token."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

PAIRS = ("keys", "values")
CARRIED = ("convolved", "recurrent")
"""The newest inputs of a convolution (B, C, width - 1), and the state of a linear attention (B, H, D, D)."""


class CarriedState(DynamicLayer):
    """A layer without keys and values: a convolution (LFM2) or linear attention (Qwen3-Next)."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        """By ``CARRIED``."""


def tensors_of(layer: CacheLayerMixin) -> dict[str, Tensor]:
    """Return a layer's tensors by name, one row of each for every row of the batch."""
    if isinstance(layer, CarriedState):
        return dict(layer.states)
    assert layer.keys is not None and layer.values is not None
    return {"keys": layer.keys, "values": layer.values}


def cache_of(layers: Iterable[Mapping[str, Tensor]]) -> DynamicCache:
    """Build a cache from the tensors of its layers; the tensors are not copied."""
    cache = DynamicCache()
    for index, tensors in enumerate(layers):
        if tensors.keys() == set(PAIRS):
            cache.update(tensors["keys"], tensors["values"], index)
        else:
            state_in(cache, index).states.update(tensors)
    return cache


def state_in(cache: DynamicCache, layer: int) -> CarriedState:
    """Return a layer of ``cache`` that carries a state, adding layers up to it if they are not there yet."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[layer], CarriedState):
        cache.layers[layer] = CarriedState()
    found = cache.layers[layer]
    assert isinstance(found, CarriedState)
    return found


def mapped(cache: DynamicCache, function: Callable[[Tensor], Tensor]) -> DynamicCache:
    """Return a cache whose tensors are ``function`` of those of ``cache``."""
    own = (tensors_of(layer) for layer in cache.layers)
    return cache_of({name: function(tensor) for name, tensor in tensors.items()} for tensors in own)
