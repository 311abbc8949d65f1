"""True attention pooled to blocks: the target of block scorers, and their upper bound."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekv_pl.attention.blocks import block_count, check_shapes, first_block


@dataclass(frozen=True)
class BlockAttention:
    """One layer's attention between blocks of queries and blocks of keys; (B, H, Nq, Nk) float32, 0 at later blocks."""

    mass: Tensor
    """Attention to all keys of a key block, averaged over the queries of a query block. Rows sum to 1."""
    peak: Tensor
    """Largest attention of any query of a block to any key of a block (2-D max pooling), SeerAttention's target
    (https://arxiv.org/abs/2410.13276)."""


@torch.no_grad()
def block_attention(query: Tensor, key: Tensor, block_size: int, *, query_tile: int = 64) -> BlockAttention:
    """Pool softmax(query key^T / sqrt(D)), causal from the lower right and computed in float32, to blocks.

    Raises ``ValueError`` for shapes that do not match, and for a block or tile of less than one token.

    Parameters
    ----------
    query
        (B, H, T, D), any dtype: the last T of the S positions. If the first query is inside a block, that block's row
        pools only the given queries.
    key
        (B, K, S, D), any dtype; H is a multiple of K.
    block_size
        Tokens per block.
    query_tile
        Queries computed at once. It limits the memory to twice B * H * query_tile * S floats, and changes no result.
    """
    check_shapes(query, key)
    for name, tokens in (("block_size", block_size), ("query_tile", query_tile)):
        if tokens < 1:
            raise ValueError(f"{name}={tokens} must be at least 1 token")
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    first, count = first_block(queries, keys, block_size), block_count(keys, block_size)
    mass = torch.zeros(batch, heads, count - first, count, device=query.device)
    peak = torch.zeros_like(mass)
    rows = torch.arange(keys - queries, keys, device=query.device) // block_size - first
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the products to 16 bits
        whole = pad(key.float(), (0, 0, 0, count * block_size - keys))  # the padding is after every query
        for start in range(0, queries, query_tile):
            tile = query[:, :, start : start + query_tile].float() * dim**-0.5
            stop = start + tile.shape[2]
            seen = block_count(keys - queries + stop, block_size)
            summed, largest = _pooled(tile, whole[:, :, : seen * block_size], keys - queries + start, block_size)
            mass[..., :seen].index_add_(2, rows[start:stop], summed)
            index = rows[start:stop, None].expand_as(largest)
            peak[..., :seen].scatter_reduce_(2, index, largest, "amax")
    return BlockAttention(mass / rows.bincount()[:, None], peak)


@dataclass
class TrueBlocks:
    """A block scorer (see attention/blocks.py) with the true attention mass as scores: the upper control.

    It first computes the whole attention, so it saves nothing.
    """

    block_size: int = 64

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """(B, H, Nq, Nk). See ``BlockScorer``."""
        return block_attention(query, key, self.block_size).mass


def _pooled(query: Tensor, key: Tensor, position: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Sum and maximum over each key block, (B, H, T, N), of the attention of scaled queries from ``position`` on."""
    batch, heads, queries, dim = query.shape
    logits = query.reshape(batch, key.shape[1], -1, dim) @ key.transpose(2, 3)
    logits = logits.view(batch, heads, queries, key.shape[2])
    later = torch.ones(queries, key.shape[2] - position, dtype=torch.bool, device=key.device).triu(1)
    logits[..., position:].masked_fill_(later, -torch.inf)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_().unflatten(-1, (-1, block_size))
    summed = weights.sum(-1)
    total = summed.sum(-1, keepdim=True)
    return summed / total, weights.amax(-1) / total
