"""A token's attention to blocks of the context, by layer and head, from one row of the attention matrix."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekv_pl.attention.blocks import block_count
from sparsekv_pl.models.devices import stacked


class HotBlocks:
    """An ``Observer`` (evicted_attention.py) that sums the last token's attention over blocks of the context.

    Pass it as ``observer=`` to a forward that runs with our attention, for instance
    ``continue_from(model, ids, DynamicCache(), 0, observer=hot)``; ``hot.mass`` then holds all layers. In a prefill of
    several chunks, observe only the last one. Each pass needs a new observer.

    Parameters
    ----------
    context_tokens
        Length of the context, the first keys. Keys after it (the question, the token itself) are in no block; their
        share is ``hot.beyond``.
    block_size
        Keys per block, in tokens; blocks start at key 0 and the last one may be shorter.
    """

    def __init__(self, context_tokens: int, block_size: int = 512) -> None:
        for name, value in {"context_tokens": context_tokens, "block_size": block_size}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.context_tokens, self.block_size = context_tokens, block_size
        self.layers: dict[int, Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        """Measure one layer: the last query of (B, H, T, D) over the keys (B, K, S, D).

        Raises
        ------
        ValueError
            If this layer was measured before, or there are fewer keys than the context has tokens.
        """
        if layer in self.layers:
            raise ValueError(f"layer {layer} was measured already: use a new HotBlocks for every pass")
        self.layers[layer] = block_mass(query[:, :, -1], key, self.context_tokens, self.block_size)

    @property
    def mass(self) -> Tensor:
        """(B, layers, H, N) float32 on the CPU: the share of a head's attention on each of N blocks."""
        return stacked([self.layers[layer] for layer in sorted(self.layers)], dim=1).cpu()

    @property
    def beyond(self) -> Tensor:
        """(B, layers, H) float32: the share of a head's attention on keys after the context."""
        return (1 - self.mass.sum(-1)).clamp(min=0)


@torch.no_grad()
def block_mass(
    query: Tensor, key: Tensor, context_tokens: int, block_size: int, scaling: float | None = None
) -> Tensor:
    """Compute softmax(query key^T * scaling) over all S keys, summed over blocks of the context.

    Parameters
    ----------
    query
        (B, H, D) of the newest token, any dtype.
    key
        (B, K, S, D), any dtype; H is a multiple of K, and the query heads of a group are neighbours.
    context_tokens, block_size
        N blocks of ``block_size`` keys cover the first ``context_tokens`` keys.
    scaling
        Factor of the scores; None: D ** -0.5.

    Returns
    -------
    (B, H, N) float32.

    Raises
    ------
    ValueError
        If there are fewer keys than ``context_tokens``.
    """
    (batch, heads, dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    if keys < context_tokens:
        raise ValueError(f"there are {keys} keys but the context has {context_tokens} tokens: nothing may be evicted")
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the products to 16 bits
        grouped = query.float().view(batch, kv_heads, -1, dim) * (dim**-0.5 if scaling is None else scaling)
        attention = (grouped @ key.float().transpose(2, 3)).softmax(-1).view(batch, heads, keys)
    blocks = block_count(context_tokens, block_size)
    filled = pad(attention[..., :context_tokens], (0, blocks * block_size - context_tokens))
    return filled.unflatten(-1, (blocks, block_size)).sum(-1)
