"""Does what was kept stay important, step after step?

Presses keep a fixed set of pairs and trust that importance is stable. DefensiveKV (Feng et al., "Taming the Fragility
of KV Cache Eviction in LLM Inference", arXiv 2510.13334) argues that this trust is fragile: a set chosen by its mean
importance can be right on average and lose most of what matters at some steps. It therefore scores a pair by its worst
case, the largest importance over the window's queries, and by no less than the mean over all pairs. The measures here
are ours; they say how far mean and worst case are apart for any press: the share of each step's importance that falls
on what was kept, its mean, its minimum over steps and its variance; and the overlap of two kept sets.

Importance is the attention that a continuation's tokens pay to the context under the full cache.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsekv_pl.models.devices import stacked


class ContextImportance:
    """An ``Observer`` (evicted_attention.py) of one full-cache continuation pass.

    ``importance[layer]`` is (B, K, T, L) float32: the attention that each of T continuation tokens pays to each of L
    context tokens, averaged over the query heads of a KV head; a row sums to less than 1, the rest goes to the
    continuation itself. T is a continuation's length (64), not the context's: this is no L x L matrix.

    Parameters
    ----------
    context_tokens
        L, the tokens in the cache when the continuation begins.
    scaling
        Factor of the dot products; None for 1 / sqrt(D).
    """

    def __init__(self, context_tokens: int, scaling: float | None = None) -> None:
        self.context_tokens = context_tokens
        self.scaling = scaling
        self.importance: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        """Add one layer: ``query`` (B, H, T, D) of the continuation, ``key`` (B, K, L + T, D) of everything.

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
        logits = logits.view(batch, kv_heads, heads // kv_heads, steps, seen)
        visible = torch.ones(steps, seen, dtype=torch.bool, device=key.device).tril(self.context_tokens)
        attention = logits.masked_fill_(~visible, -torch.inf).softmax(-1)
        self.importance[layer] = attention[..., : self.context_tokens].mean(2)


def retained_importance(importance: Tensor, kept: Tensor) -> Tensor:
    """(..., T): the share of each step's importance (..., T, L) that falls on the pairs kept, (..., L) bool.

    1 for a step that pays nothing to the context: nothing was lost.
    """
    total = importance.sum(-1)
    on_kept = (importance @ kept.unsqueeze(-1).to(importance.dtype)).squeeze(-1)
    return torch.where(total > 0, on_kept / total, 1)


def retained_by_layer(importance: Mapping[int, Tensor], kept: Sequence[Tensor]) -> Tensor:
    """(layers, B, K, T): retained importance from ``ContextImportance.importance`` and ``kept_positions``.

    Raises
    ------
    ValueError
        If they are not about the same layers.
    """
    if sorted(importance) != list(range(len(kept))):
        raise ValueError(
            f"importance is of layers {sorted(importance)} but the cache has {len(kept)}: observe a pass of the same "
            "model"
        )
    return stacked([retained_importance(importance[layer], mask) for layer, mask in enumerate(kept)])


def retained_statistics(retained: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    """What becomes of retained importance (..., T) over the steps of a continuation.

    ``counted`` is bool, broadcastable to (..., T), False for steps that are padding.

    Returns
    -------
    dict[str, Tensor]
        ``min_retained`` (the worst step), ``mean_retained`` and ``retained_variance`` (population variance over steps),
        each (...). For a case as a whole, average them over layers and KV heads.

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
    """(...): Jaccard index of two sets (..., L) bool, shared / in either; 1 where both are empty.

    Two random sets that each keep the share k overlap by about k / (2 - k): read it against that.
    """
    either = (kept | other).sum(-1)
    return torch.where(either > 0, (kept & other).sum(-1) / either, 1)


def heaviest(importance: Tensor, budget: int) -> Tensor:
    """(..., L) bool: the ``budget`` pairs of largest importance (..., L), what a press that knew it would keep."""
    if not 0 < budget <= importance.shape[-1]:
        raise ValueError(f"budget={budget} must be between 1 and the {importance.shape[-1]} pairs that there are")
    kept = torch.zeros_like(importance, dtype=torch.bool)
    return kept.scatter_(-1, importance.topk(budget, dim=-1).indices, True)
