"""The context of no token: what is asked of it is a text by itself, read with its full cache."""

import torch

from sparsekv_pl.models.cache_shape import cache_shape
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.devices import layer_device
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel


def empty_context(model: LoadedModel) -> KeptContext:
    """Return a context without tokens and pairs, whose next position is 0.

    Raises ``ValueError`` for a model without plain keys and values.
    """
    shape = cache_shape(model.model.config)
    tensors = {
        f"{kind}.{number}": torch.empty(
            (1, shape.kv_heads, 0, shape.head_dim),
            dtype=getattr(torch, str(model.backbone.dtype)),
            device=layer_device(layer),
        )
        for number, layer in enumerate(decoder_of(model.model).layers)
        if hasattr(layer, "self_attn")
        for kind in ("keys", "values")
    }
    return KeptContext(torch.empty(1, 0, dtype=torch.long), (), 0, tensors)
