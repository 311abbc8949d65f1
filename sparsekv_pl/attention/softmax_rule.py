"""Softmax rules: what a model does between the products of queries and keys and its attention weights.

Gemma 2 caps the products (https://arxiv.org/abs/2408.00118, section 2). GPT-OSS has a learnt sink per head, a logit that
takes a share of the softmax and has no value (https://arxiv.org/abs/2309.17453).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STRIP_FLOATS = 2**24
"""Limit of a strip's B * H * Q * S logits; it has at least one query."""


class SoftmaxRule(NamedTuple):
    """Weights are the softmax over the logits ``cap * tanh(products / cap)`` and, if there is one, the head's sink."""

    cap: float | None = None
    sinks: Tensor | None = None
    """(H,), logits; they take a share of the softmax, so that the weights of the keys sum to less than 1."""

    @property
    def plain(self) -> bool:
        """Whether this is the usual softmax."""
        return self.cap is None and self.sinks is None

    def logits(self, products: Tensor) -> Tensor:
        """Cap scaled dot products."""
        return products if self.cap is None else (products / self.cap).tanh() * self.cap

    def weights(self, logits: Tensor) -> Tensor:
        """Normalise logits (B, H, T, S), -inf where hidden, to weights of the same shape."""
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]


PLAIN = SoftmaxRule()


class KnowsRules:
    """The base of observers (evicted_attention.py) that take a layer's ``SoftmaxRule`` as a fifth argument."""


def rule_of(module: nn.Module) -> SoftmaxRule:
    """Return the rule of an attention layer."""
    cap: Any = getattr(module, "attn_logit_softcapping", None)
    sinks: Any = getattr(module, "sinks", None)
    return SoftmaxRule(cap, sinks)


def check_plain(rule: SoftmaxRule, what: str) -> None:
    """Raise ``ValueError`` if ``what`` would be computed under another rule than the usual softmax."""
    if not rule.plain:
        named = "caps the products of queries and keys" if rule.cap is not None else "has learnt attention sinks"
        raise ValueError(
            f"{what} is computed under the usual softmax, and this model {named}: use another model, or an analysis "
            "that knows them (attention statistics, anchors, oracle blocks)"
        )


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
        strip = states[0][:, :, start:stop], states[1][:, :, :seen], states[2][:, :, :seen], rows, rule.sinks
        if torch.is_grad_enabled() and step < queries:
            parts.append(checkpoint(_strip, *strip, rule.cap, dropout, use_reentrant=False))
        else:
            parts.append(_strip(*strip, rule.cap, dropout))
    return torch.cat(parts, dim=1).to(query.dtype)


def _strip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    cap: float | None,
    dropout: float,
) -> Tensor:
    """Attend with scaled queries (B, H, Q, D); return (B, Q, H, D)."""
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    rule = SoftmaxRule(cap, sinks)
    products = query.reshape(batch, kv_heads, -1, query.shape[-1]) @ key.transpose(2, 3)
    logits = rule.logits(products.to(torch.promote_types(products.dtype, torch.float32)))
    logits = logits.view(batch, heads, queries, keys)
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    weights = nn.functional.dropout(rule.weights(logits).to(value.dtype), dropout, training=dropout > 0)
    attended = weights.view(batch, kv_heads, -1, keys) @ value
    return attended.view(batch, heads, queries, -1).transpose(1, 2)
