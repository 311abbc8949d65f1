"""The attention that the teacher's continuation pays to the context."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.models.batch import Supervised
from sparsekv_pl.models.softmax_rule import PLAIN, KnowsRules, SoftmaxRule


def with_mass(selections: Iterable[Selection], mass: dict[int, Tensor]) -> list[tuple[Selection, Tensor]]:
    """Pair each selection with the teacher's attention mass (B, K, L) in its layer."""
    return [(selection, mass[selection.layer]) for selection in selections]


class AttentionMass(KnowsRules):
    """An ``Observer`` (evicted_attention.py) of the attention that supervised rows pay to the context, per layer.

    Only the rows of supervised positions are computed, never the full attention matrix. ``mass[layer]`` is (B, K, L)
    float32, the mean over those rows and over the query heads of a KV head.

    Parameters
    ----------
    supervised
        The continuation's supervised positions.
    context_tokens
        L, tokens of the context.
    """

    def __init__(self, supervised: Supervised, context_tokens: int) -> None:
        self.rows = supervised.columns + context_tokens
        """(B, R) positions of the supervised rows in context + continuation; other positions fill up shorter rows."""
        self.weights = torch.zeros_like(self.rows, dtype=torch.float32)
        for weights, count in zip(self.weights, supervised.counts, strict=True):
            weights[:count] = 1 / max(1, count)
        self.context_tokens = context_tokens
        self.mass: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,  # noqa: ARG002
        rule: SoftmaxRule = PLAIN,
    ) -> None:
        """Add one layer: ``query`` (B, H, T, D) has the last T of the S positions of ``key`` (B, K, S, D)."""
        batch, heads, tokens, dim = query.shape
        kv_heads, seen = key.shape[1], key.shape[2]
        rows = self.rows - (seen - tokens)
        picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
        grouped = picked.reshape(batch, kv_heads, heads // kv_heads * rows.shape[1], dim)
        logits = (grouped @ key.transpose(2, 3)).float() / dim**0.5
        future = torch.arange(seen, device=key.device) > self.rows[..., None]
        logits = rule.logits(logits.view(batch, heads, -1, seen)).masked_fill(future[:, None], float("-inf"))
        attention = rule.weights(logits)[..., : self.context_tokens] * self.weights[:, None, :, None]
        self.mass[layer] = attention.sum(2).view(batch, kv_heads, -1, self.context_tokens).mean(2)
