"""The selection loss: align the scores that a press selects by with the attention that the teacher really pays.

What a press drops sends no gradient, so the loss on tokens cannot teach it to keep what it dropped. Its scores can:
most presses score with differentiable functions of queries, keys and hidden states.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekv_pl.batch import IGNORE

TINY = 1e-9


@dataclass
class Selection:
    """What one scorer said of the keys of one layer when it selected."""

    layer: int
    press: str
    scores: Tensor
    """(B, K, S), differentiable; higher stays."""
    positions: Tensor | None = None
    """(B, K, S) int64, the context position of each scored key; None means 0..S-1, as in a single prefill."""


def with_mass(selections: Iterable[Selection], mass: dict[int, Tensor]) -> list[tuple[Selection, Tensor]]:
    """Each selection with the teacher's mass in its layer."""
    return [(selection, mass[selection.layer]) for selection in selections]


class AttentionMass:
    """An observer (see attention/cached.py) that keeps, per layer, the attention supervised rows pay to the context.

    Only the rows of supervised positions are computed, never the full attention matrix. ``mass[layer]`` is (B, K, L)
    float32: the mean over those rows and over the query heads of a KV head.

    Parameters
    ----------
    labels
        (B, T), ``IGNORE`` where not supervised; row t - 1 predicts label t.
    context_tokens
        L.
    """

    def __init__(self, labels: Tensor, context_tokens: int) -> None:
        supervised = labels[:, 1:] != IGNORE
        count = max(1, int(supervised.sum(1).max()))
        order = supervised.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        self.rows = order + context_tokens
        """(B, R) positions of the supervised rows among context + continuation; shorter rows are filled with others."""
        self.weights = supervised.gather(1, order).float()
        self.weights /= self.weights.sum(1, keepdim=True).clamp(min=1)
        self.context_tokens = context_tokens
        self.mass: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        """Add one layer: ``query`` (B, H, T, D) are the last T positions of the S that ``key`` (B, K, S, D) holds."""
        batch, heads, tokens, dim = query.shape
        kv_heads, seen = key.shape[1], key.shape[2]
        rows = self.rows - (seen - tokens)
        picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
        grouped = picked.reshape(batch, kv_heads, heads // kv_heads * rows.shape[1], dim)
        logits = (grouped @ key.transpose(2, 3)).float() / dim**0.5
        future = torch.arange(seen, device=key.device) > self.rows[..., None]
        logits = logits.view(batch, heads, -1, seen).masked_fill(future[:, None], float("-inf"))
        attention = logits.softmax(-1)[..., : self.context_tokens] * self.weights[:, None, :, None]
        self.mass[layer] = attention.sum(2).view(batch, kv_heads, -1, self.context_tokens).mean(2)


@dataclass
class SelectionLoss:
    """Cross-entropy from the teacher's attention mass to a press's normalised scores, in nats.

    A weighted mean over layers, chunks, batch rows and KV heads.

    Parameters
    ----------
    sinks
        First context tokens that are left out: every press keeps them and they would take most of the mass.
    heads
        "mass": a head counts as much as the attention it pays to what may be evicted, so that the few heads that
        retrieve are not drowned by the many that rest on the sinks. "equal": every head counts the same.
    """

    sinks: int = 4
    heads: Literal["mass", "equal"] = "mass"

    def __call__(self, selections: Iterable[tuple[Selection, Tensor]]) -> dict[str, Tensor]:
        """Scalar loss of each press by its name; its gradient reaches whatever the scores were computed from.

        Each selection comes with the teacher's mass (B, K, L) in its layer (``AttentionMass``).
        Scores that carry no gradient (a random press drawn among others) are left out, so the result may be empty.
        """
        terms: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for selection, mass_BKL in selections:
            if selection.scores.requires_grad:
                losses, weights = self._heads(selection, mass_BKL)
                terms.setdefault(selection.press, []).append((losses.flatten(), weights.flatten()))
        return {press: self._mean(*map(torch.cat, zip(*pairs, strict=True))) for press, pairs in terms.items()}

    def _heads(self, selection: Selection, mass_BKL: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each head and the mass it was measured on, both (B, K)."""
        scores, positions = selection.scores.float(), selection.positions
        if positions is None:
            positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
        evictable = (positions >= self.sinks) & ~pinned(scores)
        target = torch.where(evictable, mass_BKL.gather(-1, positions), 0)
        total = target.sum(-1)
        target = target / total.unsqueeze(-1).clamp(min=TINY)
        return -(target * log_share(scores, evictable)).sum(-1), total

    def _mean(self, losses: Tensor, weights: Tensor) -> Tensor:
        if self.heads == "equal":
            return losses.mean()
        return (losses * weights).sum() / weights.sum().clamp(min=TINY)


def pinned(scores: Tensor) -> Tensor:
    """True where a press gave its highest score by rule (its window, its sinks) and not by looking.

    kvpress presses pin by padding with one value above all others, so pinned keys tie for the maximum of the whole
    tensor.
    """
    ties = scores == scores.amax()
    return ties if int(ties.sum()) > 1 else torch.zeros_like(ties)


def log_share(scores: Tensor, evictable: Tensor) -> Tensor:
    """log of the share of the selection that each evictable key gets, (B, K, S); 0 where not evictable.

    Scores that cannot be negative (SnapKV, TOVA, ExpectedAttention) are masses: divided by their sum. Others (Knorm,
    KeyDiff) have no natural scale: they are standardised per head and go through a softmax.
    """
    if bool((scores.detach() >= 0).all()):
        masses = torch.where(evictable, scores, 0)
        shares = masses / masses.sum(-1, keepdim=True).clamp(min=TINY)
        return torch.where(evictable, shares.clamp(min=TINY).log(), 0)
    count = evictable.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(evictable, scores, 0).sum(-1, keepdim=True) / count
    centred = torch.where(evictable, scores - mean, 0)
    # Clamped before the root: where all scores tie, its gradient at 0 would be NaN.
    deviation = (centred.square().sum(-1, keepdim=True) / count).clamp(min=TINY**2).sqrt()
    logits = (centred / deviation).masked_fill(~evictable, float("-inf"))
    return torch.where(evictable, logits.log_softmax(-1), 0)
