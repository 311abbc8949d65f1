"""Which keys each query may attend to, and how much each counts: the mask of attention over an evicted cache."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsekv_pl.attention.windows import lower_right_mask


def visible_keys(
    query: Tensor,
    key: Tensor,
    near: Tensor | None,
    masked: Sequence[Tensor] | None,
    newest_visible: Tensor | None,
) -> Tensor | None:
    """Return what each query sees, bool, broadcastable to (B, H, T, S); None for all keys, or plain causality.

    Parameters
    ----------
    query, key
        (B, H, T, D) and (B, K, S, D). As many queries as keys are a new context.
    near
        What a layer's window leaves visible; None if it has none, or one that hides nothing.
    masked
        What a head-wise press hides: indices of rows, KV heads and keys.
    newest_visible
        (B, R) bool, which of the newest R keys each row may see.
    """
    queries, keys = query.shape[2], key.shape[2]
    causal = queries > 1 and (queries != keys or near is not None)
    parts = [lower_right_mask(queries, keys, query.device)] if causal else []
    if near is not None:
        parts.append(near)
    if masked is not None:
        parts.append(_without(masked, query, key))
    if newest_visible is not None:
        older = newest_visible.new_ones(len(key), keys - newest_visible.shape[1])
        parts.append(torch.cat([older, newest_visible], dim=1)[:, None, None])
    seen = None
    for part in parts:
        seen = part if seen is None else part & seen
    return seen


def key_weights(log_weights: Tensor, visible: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Return an additive mask (B, H, T or 1, S): log-weights (B, K, S') of the oldest keys, -inf where not visible."""
    if log_weights.shape[2] > key.shape[2]:
        raise ValueError(
            f"{log_weights.shape[2]} keys were faded out, of which a press after that left {key.shape[2]}: put "
            "SoftThresholdPress last, or use it alone"
        )
    weights = nn.functional.pad(log_weights, (0, key.shape[2] - log_weights.shape[2])).to(query.dtype)
    weights = weights.repeat_interleave(query.shape[1] // key.shape[1], dim=1).unsqueeze(2)
    return weights if visible is None else weights.masked_fill(~visible, -torch.inf)


def _without(masked: Sequence[Tensor], query: Tensor, key: Tensor) -> Tensor:
    """Return (B, H, 1, S) bool, False at ``masked``: indices of rows, KV heads and keys."""
    visible = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
    visible[tuple(masked)] = False
    return visible.repeat_interleave(query.shape[1] // key.shape[1], dim=1).unsqueeze(2)
