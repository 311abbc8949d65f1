"""Attention under a rule other than the usual softmax (models/softmax_rule.py), in strips of queries."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsekv_pl.attention.windows import lower_right_mask
from sparsekv_pl.models.softmax_rule import SoftmaxRule

STRIP_FLOATS = 2**24
"""Limit of a strip's B * H * Q * S logits; it has at least one query."""


def attention_by_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rule: SoftmaxRule,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend under ``rule`` in strips of queries, never T x S at once; return (B, T, H, D). Differentiable.

    Backward computes each strip again. Products have the inputs' dtype and the softmax float32, as in eager attention.
    No fused kernel has both a cap and sinks: this is slower than PyTorch's attention.

    Parameters
    ----------
    query, key, value
        ``query`` (B, H, T, D) has the last T of the S positions of ``key`` and ``value`` (B, K, S, D).
    mask
        Bool or additive, broadcast to (B, H, T, S); None for causal, aligned to the lower right.
    rule, scaling, dropout
        The rule, its sinks with a gradient if they require one; the factor of the products, None for 1 / sqrt(D).
    """
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    wide = torch.promote_types(query.dtype, key.dtype)
    states = query.to(wide) * (dim**-0.5 if scaling is None else scaling), key.to(wide), value.to(wide)
    step = max(1, STRIP_FLOATS // (batch * heads * keys))
    parts = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        seen = keys if mask is not None else keys - queries + stop
        rows = mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]
        strip = states[0][:, :, start:stop], states[1][:, :, :seen], states[2][:, :, :seen], rows, rule, dropout
        if torch.is_grad_enabled() and step < queries:
            parts.append(checkpoint(_strip, *strip, use_reentrant=False))
        else:
            parts.append(_strip(*strip))
    return torch.cat(parts, dim=1).to(query.dtype)


def _strip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rule: SoftmaxRule,
    dropout: float,
) -> Tensor:
    """Attend with scaled queries (B, H, Q, D); return (B, Q, H, D)."""
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    products = query.reshape(batch, kv_heads, -1, query.shape[-1]) @ key.transpose(2, 3)
    logits = rule.logits(products.to(torch.promote_types(products.dtype, torch.float32)))
    logits = logits.view(batch, heads, queries, keys)
    if mask is None:
        mask = lower_right_mask(queries, keys, query.device)
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    weights = nn.functional.dropout(rule.weights(logits).to(value.dtype), dropout, training=dropout > 0)
    attended = weights.view(batch, kv_heads, -1, keys) @ value
    return attended.view(batch, heads, queries, -1).transpose(1, 2)
