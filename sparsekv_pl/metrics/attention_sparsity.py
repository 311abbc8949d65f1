"""Sparsity of attention by layer and head."""

from typing import Any

import torch
from torch import Tensor

from sparsekv_pl.attention.statistics import LayerStatistics
from sparsekv_pl.metrics.additive import AdditiveMetric

MEASURES = ("effective_support", "top_k_coverage", "block_sparsity", "anchor_share")


class AttentionSparsity(AdditiveMetric):
    """Means of attention statistics over all queries of all rows, batches and ranks, by layer and head.

    ``compute`` returns ``effective_support`` (keys), ``top_k_coverage``, ``block_sparsity`` and ``anchor_share`` (each
    in [0, 1]), all (layers, heads) float32; ``LayerStatistics`` defines them. They are NaN for a layer without
    statistics; ``anchor_share`` is also NaN if statistics without a token set were added.

    Parameters
    ----------
    layers
        Number of attention layers of the model.
    heads
        Number of query heads per layer.
    """

    higher_is_better = None
    effective_support: Tensor
    top_k_coverage: Tensor
    block_sparsity: Tensor
    anchor_share: Tensor
    queries: Tensor

    def __init__(self, layers: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in MEASURES:
            self.add_state(name, torch.zeros(layers, heads, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros(layers, 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, layer: int, statistics: LayerStatistics) -> None:
        """Add one layer's statistics (B, H, W).

        Raises
        ------
        ValueError
            For a layer or a number of heads that do not fit this metric.
        """
        layers, heads = self.effective_support.shape
        if not 0 <= layer < layers or statistics.entropy.shape[1] != heads:
            raise ValueError(
                f"statistics of {statistics.entropy.shape[1]} heads of layer {layer} do not fit "
                f"AttentionSparsity(layers={layers}, heads={heads})"
            )
        share = statistics.token_share
        self.effective_support[layer] += self._summed(statistics.effective_support)
        self.top_k_coverage[layer] += self._summed(statistics.top_k_coverage)
        self.block_sparsity[layer] += self._summed(statistics.block_sparsity)
        self.anchor_share[layer] += torch.nan if share is None else self._summed(share)
        self.queries[layer] += statistics.entropy[:, 0].numel()

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name, (layers, heads) float32."""
        return {name: (getattr(self, name) / self.queries).float() for name in MEASURES}

    def _summed(self, per_query_BHW: Tensor) -> Tensor:
        """Sum over rows and queries, (H,) float64, on the metric's device."""
        return per_query_BHW.double().sum((0, 2)).to(self.device)
