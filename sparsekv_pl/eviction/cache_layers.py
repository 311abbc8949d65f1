"""The layers of a cache: keys and values, and what a layer without attention carries from token to token."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

PAIRS = ("keys", "values")
CARRIED = ("convolved", "recurrent")
"""The newest inputs of a convolution (B, C, width - 1), and the state of a linear attention or a state space, (B, H,
D, D) or (B, H, P, N)."""


class CarriedState(DynamicLayer):
    """A layer with states: a convolution (LFM2), linear attention (Qwen3-Next), a state space beside an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        """By ``CARRIED``."""


def tensors_of(layer: CacheLayerMixin) -> dict[str, Tensor]:
    """Return a layer's tensors by name, one row of each for every row of the batch."""
    states = dict(layer.states) if isinstance(layer, CarriedState) else {}
    if layer.keys is None or layer.values is None:
        assert states
        return states
    return {"keys": layer.keys, "values": layer.values, **states}


def cache_of(layers: Iterable[Mapping[str, Tensor]]) -> DynamicCache:
    """Build a cache from the tensors of its layers; the tensors are not copied."""
    cache = DynamicCache()
    for index, tensors in enumerate(layers):
        if states := {name: tensor for name, tensor in tensors.items() if name not in PAIRS}:
            state_in(cache, index).states.update(states)
        if set(PAIRS) <= tensors.keys():
            cache.update(tensors["keys"], tensors["values"], index)
    return cache


def state_in(cache: DynamicCache, layer: int) -> CarriedState:
    """Return a layer of ``cache`` that carries a state, adding layers up to it if they are not there yet."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    found = cache.layers[layer]
    if not isinstance(found, CarriedState):
        carried = CarriedState()
        vars(carried).update(vars(found))  # its keys and values
        found = cache.layers[layer] = carried
    return found


def mapped(cache: DynamicCache, function: Callable[[Tensor], Tensor]) -> DynamicCache:
    """Return a cache whose tensors are ``function`` of those of ``cache``."""
    own = (tensors_of(layer) for layer in cache.layers)
    return cache_of({name: function(tensor) for name, tensor in tensors.items()} for tensors in own)
