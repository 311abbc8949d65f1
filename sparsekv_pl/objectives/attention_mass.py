"""The attention that the teacher's continuation pays to the context."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.models.batch import Supervised
from sparsekv_pl.models.softmax_rule import PLAIN, KnowsRules, SoftmaxRule

Later = dict[int, dict[int, Tensor]]
"""layer -> tokens read at an eviction -> (B, K, as many)."""
ROWS = 256
"""Supervised rows whose attention exists at once."""


def with_mass(
    selections: Iterable[Selection], mass: Mapping[int, Tensor], later: Mapping[int, Mapping[int, Tensor]] | None = None
) -> list[tuple[Selection, Tensor]]:
    """Pair each selection with the teacher's attention mass in its layer: (B, K, L), or of ``later`` at its eviction.

    ``mass`` and ``later`` are those of ``AttentionMass``.
    """
    found = []
    for selection in selections:
        own = {} if later is None else later.get(selection.layer, {})
        found.append((selection, own.get(selection.seen or 0, mass[selection.layer])))
    return found


class AttentionMass(KnowsRules):
    """An ``Observer`` (evicted_attention.py) of the attention that supervised rows pay to the context, per layer.

    Only the rows of supervised positions are computed, never the full attention matrix. ``mass[layer]`` is (B, K, L)
    float32, the mean over those rows and over the query heads of a KV head. ``later[layer][n]``, (B, K, n), is the same
    for the first n tokens of context and continuation, a mean over the supervised rows after them; 0 without any.

    Parameters
    ----------
    supervised
        The continuation's supervised positions.
    context_tokens
        L, tokens of the context.
    evictions
        The n of ``later``: after how many tokens the continuation is evicted from.
    """

    def __init__(self, supervised: Supervised, context_tokens: int, evictions: Sequence[int] = ()) -> None:
        self.rows = supervised.columns + context_tokens
        """(B, R) positions of the supervised rows in context + continuation; other positions fill up shorter rows."""
        real = torch.zeros_like(self.rows, dtype=torch.bool)
        for row, count in zip(real, supervised.counts, strict=True):
            row[:count] = True
        self.ends = (context_tokens, *evictions)
        after = torch.stack([real & (self.rows >= end) for end in self.ends], dim=1).float()
        self.weights = after / after.sum(-1, keepdim=True).clamp(min=1)
        """(B, evictions, R), each row's share of an eviction's mean."""
        self.context_tokens = context_tokens
        self.mass: dict[int, Tensor] = {}
        self.later: Later = {}

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: SoftmaxRule = PLAIN) -> None:  # noqa: ARG002
        """Add one layer: ``query`` (B, H, T, D) has the last T of the S positions of ``key`` (B, K, S, D)."""
        kv_heads, last = key.shape[1], self.ends[-1]
        parts = zip(self.rows.split(ROWS, dim=1), self.weights.split(ROWS, dim=2), strict=True)
        means = torch.zeros(*query.shape[:2], len(self.ends), last, dtype=torch.float32, device=query.device)
        for rows, weights in parts:
            attention = self._attention(rows, query, key, rule)[..., :last]
            with torch.autocast(query.device.type, enabled=False):  # it would round the means to 16 bits
                means += weights[:, None] @ attention
        grouped = means.unflatten(1, (kv_heads, -1)).mean(2)  # (B, K, evictions, last)
        self.mass[layer] = grouped[:, :, 0, : self.context_tokens]
        self.later[layer] = {end: grouped[:, :, place, :end] for place, end in enumerate(self.ends) if place}

    def _attention(self, rows: Tensor, query: Tensor, key: Tensor, rule: SoftmaxRule) -> Tensor:
        """Return the causal attention (B, H, R, S) of the rows at positions ``rows`` (B, R)."""
        batch, heads, tokens, dim = query.shape
        kv_heads, seen = key.shape[1], key.shape[2]
        own = rows - (seen - tokens)
        picked = query.gather(2, own[:, None, :, None].expand(-1, heads, -1, dim))
        grouped = picked.reshape(batch, kv_heads, heads // kv_heads * rows.shape[1], dim)
        logits = _products(grouped, key) / dim**0.5
        future = torch.arange(seen, device=key.device) > rows[..., None]
        logits = rule.logits(logits.view(batch, heads, -1, seen)).masked_fill(future[:, None], float("-inf"))
        return rule.weights(logits)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Multiply queries (B, K, N, D) with keys (B, K, S, D); return (B, K, N, S) float32.

    Computed in float32 in place of float16, which ends at 65,504; bfloat16 reaches as far as float32.
    """
    device = key.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key.dtype
    if dtype != torch.float16:
        return (query @ key.transpose(2, 3)).float()
    with torch.autocast(device, enabled=False):
        return query.float() @ key.float().transpose(2, 3)
