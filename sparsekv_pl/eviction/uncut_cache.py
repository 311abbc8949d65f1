"""The cache of a single chunk as it was before a press cut it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.cache_layers import CarriedState, state_in
from sparsekv_pl.models.layer_kinds import attentions


@contextmanager
def uncut_cache(model: PreTrainedModel, cache: DynamicCache) -> Iterator[DynamicCache]:
    """Collect what a forward inside the block writes to ``cache`` in another cache, differentiably.

    Enter it before the press, so that its hooks see a layer's keys and values first. The states of layers without
    attention, which no press cuts, are there after the block.
    """
    whole = DynamicCache()

    def keep(module: nn.Module, _args: Any, _output: Any) -> None:
        index = module.layer_idx
        assert isinstance(index, int)
        layer = cache.layers[index]
        assert layer.keys is not None and layer.values is not None
        whole.update(layer.keys, layer.values, index)

    with ExitStack() as stack:
        for attention in attentions(model).values():
            stack.callback(attention.register_forward_hook(keep).remove)
        yield whole
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CarriedState):
            state_in(whole, index).states.update(layer.states)
