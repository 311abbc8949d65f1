"""The attention of a context's last queries to all keys, by which presses score; never an L x L matrix."""

from collections.abc import Mapping
from typing import Any

import torch
from kvpress.utils import get_prerope_query_states
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from sparsekv_pl.models.softmax_rule import rule_of, scaling_of
from sparsekv_pl.presses.key_tokens import first_key, real_keys


def window_attention(
    module: nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: Mapping[str, Any], window: int
) -> Tensor:
    """Compute the causal attention (B, H, W, S) of the last W tokens to all keys, float32 (float64 for float64 keys).

    ``keys`` (B, K, S, D) are in the order of their positions, the newest belong to ``hidden_states`` (B, L, E); W is
    the smaller of ``window`` and L. Differentiable. The queries are recomputed from the hidden states, as in kvpress's
    SnapKVPress. In a padded row, on either side, the last W queries are those of its last real tokens, and padding
    receives nothing; a row with fewer than W tokens starts with rows of 0.
    """
    real = real_keys(keys, kwargs)
    batch, tokens = hidden_states.shape[:2]
    seen = keys.shape[2]
    window = min(window, tokens)
    last = torch.full((batch,), seen, device=keys.device) if real is None else _ends(real)
    at_key = last[:, None] - window + torch.arange(window, device=keys.device)  # (B, W)
    at_token = at_key - (seen - tokens)
    hidden = (torch.arange(seen, device=keys.device) > at_key[..., None]) | (at_token < 0)[..., None]
    if real is not None:
        hidden = hidden | ~real[:, None]
    query = _queries(module, hidden_states, at_token.clamp(min=0), keys, kwargs)
    heads, dim = query.shape[1], query.shape[3]
    kv_heads = keys.shape[1]
    exact, rule = torch.promote_types(keys.dtype, torch.float32), rule_of(module)
    with torch.autocast(keys.device.type, enabled=False):
        grouped = query.to(exact).view(batch, kv_heads, heads // kv_heads * window, dim)
        logits = (grouped @ keys.to(exact).transpose(2, 3)).view(batch, heads, window, seen)
        logits = rule.logits(logits * scaling_of(module))
        attention = rule.weights(logits.masked_fill(hidden[:, None], torch.finfo(exact).min))
    return attention if real is None else attention.masked_fill(hidden[:, None], 0)


def window_rows(attention: Tensor) -> Tensor:
    """Count the nonzero rows of ``window_attention``'s result (B, H, W, S), at least 1, (B, H, 1), for averages."""
    return attention.detach().sum(-1).sum(-1, keepdim=True).round().clamp(min=1)


def _ends(real: Tensor) -> Tensor:
    """Return the index (B,) one past the last real key of each row of ``real`` (B, S)."""
    return real.shape[1] - real.flip(1).int().argmax(1)


def _queries(
    module: nn.Module, hidden_states: Tensor, at_token: Tensor, keys: Tensor, kwargs: Mapping[str, Any]
) -> Tensor:
    """Compute the rotated queries (B, H, W, D) of the tokens at indices ``at_token`` (B, W)."""
    index = at_token[..., None]
    query = get_prerope_query_states(module, hidden_states.gather(1, index.expand(-1, -1, hidden_states.shape[-1])))
    cos, sin = (
        part.expand(len(at_token), -1, -1).gather(1, index.expand(-1, -1, part.shape[-1]))[:, None]
        for part in _rotary(module, hidden_states, keys, kwargs)
    )
    rotary = cos.shape[-1]  # Phi3 may rotate only a part of the dimensions
    turned, rest = query[..., :rotary], query[..., rotary:]
    return torch.cat([turned * cos + rotate_half(turned) * sin, rest], dim=-1)


def _rotary(module: nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (1 or B, L, D) of the tokens of ``hidden_states`` (B, L, E).

    They differ from the forward's if a wrapper passes a part of the context (ChunkPress) or the tokens of several
    forwards (DecodingPress).
    """
    cos, sin = kwargs["position_embeddings"]
    tokens = hidden_states.shape[1]
    if tokens > cos.shape[1]:
        back = torch.arange(tokens - 1, -1, -1, device=keys.device)
        return module.rotary_emb(hidden_states, kwargs["position_ids"][:, -1:] - back)  # type: ignore[operator]
    if tokens == cos.shape[1]:
        return cos, sin
    start = first_key(keys)
    return cos[:, start : start + tokens], sin[:, start : start + tokens]
