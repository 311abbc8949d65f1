"""What the last queries of a context attend to: the rows that presses judge keys by, never an L x L matrix."""

from collections.abc import Mapping
from typing import Any

import torch
from kvpress.utils import get_prerope_query_states
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from sparsekv_pl.presses.tokens import real_keys


def window_attention(
    module: nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: Mapping[str, Any], window: int
) -> Tensor:
    """(B, H, W, S) float32: the attention that the last W tokens pay to all keys (B, K, S, D), causal.

    W is the smallest of ``window`` and the tokens of ``hidden_states`` (B, L, E). Differentiable. The queries are
    computed anew from the hidden states, as kvpress's SnapKVPress does. In a row that is padded, on either side, the
    last W queries are those of its last real tokens, and padding receives nothing.
    """
    real = real_keys(keys, kwargs)
    batch, tokens = hidden_states.shape[:2]
    seen = keys.shape[2]
    window = min(window, tokens)
    last = torch.full((batch,), seen, device=keys.device) if real is None else _ends(real)
    at_key = (last[:, None] - window + torch.arange(window, device=keys.device)).clamp(min=seen - tokens)  # (B, W)
    at_token = at_key - (seen - tokens)
    states = hidden_states.gather(1, at_token[..., None].expand(-1, -1, hidden_states.shape[-1]))
    query = _rotated(get_prerope_query_states(module, states), at_token, kwargs["position_embeddings"])
    heads, dim = query.shape[1], query.shape[3]
    kv_heads = keys.shape[1]
    with torch.autocast(keys.device.type, enabled=False):
        grouped = query.float().view(batch, kv_heads, heads // kv_heads * window, dim)
        logits = (grouped @ keys.float().transpose(2, 3)).view(batch, heads, window, seen)
        logits = logits * float(getattr(module, "scaling", dim**-0.5))
        hidden = torch.arange(seen, device=keys.device) > at_key[..., None]
        if real is not None:
            hidden = hidden | ~real[:, None]
        return logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1)


def _ends(real: Tensor) -> Tensor:
    """(B,) one past the last real key of each row of (B, S)."""
    return real.shape[1] - real.flip(1).int().argmax(1)


def _rotated(query: Tensor, at_token: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Queries (B, H, W, D) turned by the rotary embeddings (1 or B, L, D) of tokens (B, W)."""
    cos, sin = (
        part.expand(len(at_token), -1, -1).gather(1, at_token[..., None].expand(-1, -1, part.shape[-1]))[:, None]
        for part in position_embeddings
    )
    rotary = cos.shape[-1]  # Phi3 may rotate a part of the dimensions alone
    turned, rest = query[..., :rotary], query[..., rotary:]
    return torch.cat([turned * cos + rotate_half(turned) * sin, rest], dim=-1)
