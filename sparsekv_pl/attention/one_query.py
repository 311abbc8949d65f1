"""Attention of single queries, as in decoding."""

import torch
from torch import Tensor


def one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attend with one new token per row (B, H, 1, D), in float32 and without repeating KV heads; return (B, 1, H, D).

    On CPUs PyTorch's kernel takes several times as long for a single query in bfloat16: see docs/log/speed.md.
    """
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().view(batch, kv_heads, -1, dim) * (dim**-0.5 if scaling is None else scaling)
        scores = grouped @ key.float().transpose(2, 3)
        if mask is not None:
            visible = mask.expand(batch, heads, 1, -1).reshape(scores.shape)
            scores = scores.masked_fill(~visible, -torch.inf)
        attended = scores.softmax(-1) @ value.float()
    return attended.view(batch, 1, heads, dim).to(query.dtype)
