"""The cache of a single chunk as it was before a press cut it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.models.layer_kinds import attentions
from sparsekv_pl.presses.cache_keyword import with_cache


@contextmanager
def uncut_cache(model: PreTrainedModel) -> Iterator[DynamicCache]:
    """Collect the keys and values of a forward inside the block in a cache of their own, differentiably.

    Enter it before the press, so that its hooks see a layer's cache first.
    """
    whole = DynamicCache()

    def keep(module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        index = module.layer_idx
        assert isinstance(index, int)
        layer = with_cache(kwargs)["past_key_values"].layers[index]
        keys: Tensor = layer.keys
        whole.update(keys, layer.values, index)

    with ExitStack() as stack:
        for attention in attentions(model).values():
            stack.callback(attention.register_forward_hook(keep, with_kwargs=True).remove)
        yield whole
