"""Block-sparse attention through FlexAttention, whose kernels skip the blocks that a mask leaves out.

FlexAttention (arXiv 2412.05496) takes for every query block the key blocks to compute with a mask (a block's own, which
is causal) and those to compute without one (earlier blocks).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from sparsekv_pl.attention.blocks import NOTHING, Blocks, block_count

TILE = 64
"""Tokens per tile of queries and of keys, set for the forward; blocks are whole tiles."""
DEFAULT_TILE = 128
"""The largest tile that it chooses by itself; the backward's tile cannot be set."""


def suits_flex(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> bool:
    """Return whether compiled FlexAttention supports these inputs: a GPU, several query blocks, blocks of whole tiles.

    A tile is 64 tokens, or 128 with gradients. Queries of a single block (decoding) are gathered instead, which does
    not compile for every cache length.
    """
    learns = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    whole = blocks.block_size % (DEFAULT_TILE if learns else TILE) == 0
    return query.is_cuda and blocks.indices.shape[2] > 1 and whole


def flex_mask(blocks: Blocks) -> BlockMask:
    """Make the block mask of whole query blocks, the last one padded, over the keys.

    Earlier blocks are full blocks, own blocks are partial ones. The mask function contains the selection too, because
    FlexAttention uses it alone when it is not compiled.
    """
    size, count = blocks.block_size, block_count(blocks.keys, blocks.block_size)
    batch, groups, rows, _ = blocks.indices.shape
    selected = blocks.mask()
    device = selected.device
    first = torch.tensor(blocks.first * size, device=device)  # as a tensor it compiles once, not for every chunk

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + first) & selected[row, head % groups, query // size, key // size]

    own = torch.arange(blocks.first, count, dtype=torch.int32, device=device)
    partial = torch.zeros(batch, groups, rows, count, dtype=torch.int32, device=device)
    partial[..., 0] = own
    earlier = blocks.indices.where(blocks.indices < own[:, None], NOTHING)
    full_count = (earlier != NOTHING).sum(-1, dtype=torch.int32)
    full = pad(earlier.clamp(min=0), (0, count - earlier.shape[-1])).int()
    return BlockMask.from_kv_blocks(
        torch.ones_like(full_count),
        partial,
        full_count,
        full,
        BLOCK_SIZE=size,
        mask_mod=visible,
        seq_lengths=(rows * size, blocks.keys),
    )


def flex_attention_over(
    blocks: Blocks, query: Tensor, key: Tensor, value: Tensor, scaling: float, compiled: bool = True
) -> Tensor:
    """Compute ``dense_reference`` with FlexAttention; if not ``compiled``, it computes all pairs, for tests."""
    queries, size = query.shape[2], blocks.block_size
    before = blocks.keys - queries - blocks.first * size
    whole = pad(query, (0, 0, before, -blocks.keys % size))
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}  # its decoding kernel has other tiles
    if size % DEFAULT_TILE:
        options |= {"BLOCK_M": TILE, "BLOCK_N": TILE}
    attend = _compiled() if compiled else flex_attention
    mask = flex_mask(blocks)
    attended: Tensor = attend(
        whole, key, value, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=options
    )
    return attended[:, :, before : before + queries]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
