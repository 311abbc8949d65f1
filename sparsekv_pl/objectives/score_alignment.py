"""Losses between a press's scores and the teacher's attention mass, per head.

Some scores are masses: SnapKV, TOVA and ExpectedAttention never score below 0, and a key's share is its score divided
by the sum. Others (Knorm, KeyDiff) only order the keys: they are standardised, to mean 0 and deviation 1 over the
evictable keys of a head, before a softmax. That softmax is far flatter than attention; a ``temperature`` below 1
sharpens it.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sparsekv_pl.presses.caught_scores import pinned, standardised

TINY = 1e-9


def evictable_keys(scores: Tensor, sinks: int, positions: Tensor | None = None) -> Tensor:
    """Return (B, K, S) bool, True for keys that scores select: not among the first ``sinks``, not kept by rule.

    ``positions`` (B, K, S) int64 are the keys' context positions; None means 0..S-1. Infinite scores are rules too:
    padding is evicted first, protected keys never.
    """
    if positions is None:
        positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    return (positions >= sinks) & ~pinned(scores) & ~scores.isinf()


def key_logits(scores: Tensor, evictable: Tensor, temperature: float = 1.0, standardise: bool = False) -> Tensor:
    """Compute logits (B, K, S) whose softmax is each key's share of the selection; -inf where not evictable.

    Masses become their logs; other scores, and with ``standardise`` those logs too, are standardised and divided by
    ``temperature``.
    """
    # Both are computed, and one is chosen row by row: a branch would synchronise with the GPU in every layer.
    are_masses = ((scores.detach() >= 0) | ~evictable).flatten(1).all(1).view(-1, 1, 1)
    masses = torch.where(evictable & are_masses, scores, 0)
    logs = (masses / masses.sum(-1, keepdim=True).clamp(min=TINY)).clamp(min=TINY).log()
    scores = torch.where(are_masses, logs, scores)
    ordered = standardised(scores, evictable) / temperature
    scores = ordered if standardise else torch.where(are_masses, logs, ordered)
    return scores.masked_fill(~evictable, -torch.inf)


def cross_entropy(logits: Tensor, target: Tensor, evictable: Tensor) -> Tensor:
    """Cross-entropy (B, K), in nats, from the teacher's shares ``target`` (B, K, S) to the softmax of ``logits``."""
    return -(target * torch.where(evictable, logits.log_softmax(-1), 0)).sum(-1)


def ranking(logits: Tensor, target: Tensor, evictable: Tensor, top_share: float) -> Tensor:
    """Pairwise logistic loss (B, K), in nats, between the keys with most of the teacher's attention and the rest.

    Each key i of the teacher's top must outrank all others j: softplus(logsumexp_j z_j - z_i), an upper bound of its
    worst pair's softplus(z_j - z_i) that costs O(S) instead of a matrix of pairs. A key's weight is the gain of keeping
    it instead of an average other key: its mass minus the others' mean. The weights of a head sum to 1. The loss
    constrains neither proportions nor the order inside the top or inside the rest.
    """
    top = teachers_top(target, evictable, top_share)
    others = evictable & ~top
    rest = logits.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    mean = torch.where(others, target, 0).sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp(min=1)
    gain = torch.where(top, target - mean, 0)
    weights = gain / gain.sum(-1, keepdim=True).clamp(min=TINY)
    return (weights * softplus(rest - logits.masked_fill(~top, 0))).sum(-1)


def teachers_top(target: Tensor, evictable: Tensor, top_share: float) -> Tensor:
    """Return (B, K, S) bool: the ``top_share`` (rounded up) of evictable keys with most of the teacher's attention."""
    ranks = target.masked_fill(~evictable, -1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return evictable & (ranks < (evictable.sum(-1, keepdim=True) * top_share).ceil())
