"""Stability of an eviction: whether the kept pairs stay important step after step.

Presses keep a fixed set of pairs, assuming that importance is stable. DefensiveKV (Feng et al., "Taming the Fragility
of KV Cache Eviction in LLM Inference", arXiv 2510.13334) argues that this assumption is fragile: a set chosen by mean
importance can be right on average and lose most of the importance at some steps. It therefore scores a pair by its
worst case, the largest importance over the window's queries, and at least by the mean over all pairs. The measures here
are this project's; they compare mean and worst case for any press: the share of each step's importance on kept pairs,
its mean, minimum and variance over steps; and the overlap of two kept sets.

Importance is the attention that a continuation's tokens pay to the context under the full cache.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsekv_pl.attention.windows import lower_right_mask
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.models.softmax_rule import PLAIN, KnowsRules, SoftmaxRule


class ContextImportance(KnowsRules):
    """An ``Observer`` (evicted_attention.py) of one full-cache continuation pass.

    ``importance[layer]`` is (B, K, T, L) float32: the attention that each of T continuation tokens pays to each of L
    context tokens, averaged over the query heads of a KV head. Rows sum to less than 1; the rest goes to the
    continuation itself. T is the continuation's length (64), so this is no L x L matrix.

    Parameters
    ----------
    context_tokens
        L, number of tokens in the cache when the continuation begins.
    scaling
        Factor of the dot products; None for 1 / sqrt(D).
    """

    def __init__(self, context_tokens: int, scaling: float | None = None) -> None:
        self.context_tokens = context_tokens
        self.scaling = scaling
        self.importance: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: SoftmaxRule = PLAIN) -> None:  # noqa: ARG002
        """Add one layer: ``query`` (B, H, T, D) of the continuation, ``key`` (B, K, L + T, D) of all tokens.

        Raises
        ------
        ValueError
            If the pass is not a continuation of a full cache of ``context_tokens``.
        """
        batch, heads, steps, dim = query.shape
        kv_heads, seen = key.shape[1:3]
        if seen - steps != self.context_tokens:
            raise ValueError(
                f"{steps} tokens attend to {seen} keys, so the cache held {seen - steps} pairs and not the "
                f"{self.context_tokens} of the whole context: observe one pass that continues a full cache"
            )
        with torch.autocast(query.device.type, enabled=False):  # it would round the products to 16 bits
            grouped = query.float().reshape(batch, kv_heads, -1, dim)
            logits = grouped @ key.float().transpose(2, 3) * (dim**-0.5 if self.scaling is None else self.scaling)
        logits = rule.logits(logits.view(batch, heads, steps, seen))
        visible = lower_right_mask(steps, seen, key.device)
        attention = rule.weights(logits.masked_fill_(~visible, -torch.inf))[..., : self.context_tokens]
        self.importance[layer] = attention.unflatten(1, (kv_heads, -1)).mean(2)


def retained_importance(importance: Tensor, kept: Tensor) -> Tensor:
    """Compute the share (..., T) of each step's importance (..., T, L) on kept pairs, (..., L) bool.

    1 for a step without attention to the context, as nothing was lost.
    """
    total = importance.sum(-1)
    on_kept = (importance @ kept.unsqueeze(-1).to(importance.dtype)).squeeze(-1)
    return torch.where(total > 0, on_kept / total, 1)


def retained_by_layer(importance: Mapping[int, Tensor], kept: Sequence[Tensor]) -> Tensor:
    """Compute retained importance (layers, B, K, T) from ``ContextImportance.importance`` and ``kept_positions``.

    Raises
    ------
    ValueError
        If they are not of the same layers.
    """
    if sorted(importance) != list(range(len(kept))):
        raise ValueError(
            f"importance is of layers {sorted(importance)} but the cache has {len(kept)}: observe a pass of the same "
            "model"
        )
    return stacked([retained_importance(importance[layer], mask) for layer, mask in enumerate(kept)])


def retained_statistics(retained: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    """Compute statistics of retained importance (..., T) over the steps of a continuation.

    ``counted`` is bool, broadcastable to (..., T), False for steps that are padding; None counts all.

    Returns
    -------
    dict[str, Tensor]
        ``min_retained`` (the worst step), ``mean_retained`` and ``retained_variance`` (population variance over steps),
        each (...). Average them over layers and KV heads for a whole case.

    Raises
    ------
    ValueError
        For a continuation without a counted step.
    """
    counted = torch.ones_like(retained, dtype=torch.bool) if counted is None else counted.expand_as(retained)
    steps = counted.sum(-1)
    if bool((steps == 0).any()):
        raise ValueError("a continuation without a counted step has no retained importance: give at least one")
    mean = torch.where(counted, retained, 0).sum(-1) / steps
    deviation = torch.where(counted, retained - mean.unsqueeze(-1), 0)
    return {
        "min_retained": torch.where(counted, retained, torch.inf).amin(-1),
        "mean_retained": mean,
        "retained_variance": deviation.square().sum(-1) / steps,
    }


def overlap(kept: Tensor, other: Tensor) -> Tensor:
    """Compute the Jaccard index (...) of two sets (..., L) bool; 1 if both are empty.

    The baseline for two random sets that each keep the share k is about k / (2 - k).
    """
    either = (kept | other).sum(-1)
    return torch.where(either > 0, (kept & other).sum(-1) / either, 1)


def heaviest(importance: Tensor, budget: int) -> Tensor:
    """Return (..., L) bool: the ``budget`` pairs of largest importance (..., L), the selection of an ideal press.

    Raises ``ValueError`` for a budget outside 1 to L.
    """
    if not 0 < budget <= importance.shape[-1]:
        raise ValueError(f"budget={budget} must be between 1 and the {importance.shape[-1]} pairs that there are")
    kept = torch.zeros_like(importance, dtype=torch.bool)
    return kept.scatter_(-1, importance.topk(budget, dim=-1).indices, True)
