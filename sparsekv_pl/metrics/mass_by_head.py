"""The attention that a press's selection keeps, by layer and KV head."""

from typing import Any

import torch
from torch import Tensor

from sparsekv_pl.metrics.additive import AdditiveMetric


class MassByHead(AdditiveMetric):
    """Weighted means of the attention kept and of the most that the budget could keep, over rows and ranks.

    ``compute`` returns ``kept`` and ``most``, float32 scalars over all heads, and ``reached``, (layers, K), the kept
    attention over the most by head: 1 is the ceiling. NaN without weights.

    >>> metric = MassByHead(1, 2)
    >>> metric.update(0, torch.tensor([[0.5, 1.0]]), torch.tensor([[0.75, 1.0]]), torch.tensor([[3.0, 1.0]]))
    >>> metric.compute()
    {'kept': tensor(0.6250), 'most': tensor(0.8125), 'reached': tensor([[0.6667, 1.0000]])}

    Parameters
    ----------
    layers, kv_heads
        Shape of the model.
    """

    higher_is_better = None
    sums: Tensor

    def __init__(self, layers: int, kv_heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(3, layers, kv_heads, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, layer: int, kept: Tensor, most: Tensor, weights: Tensor) -> None:
        """Add rows of one layer; all three are (B, K)."""
        found = torch.stack([kept * weights, most * weights, weights]).double().sum(1)
        self.sums[:, layer] += found.to(self.sums.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the means; see the class."""
        kept, most, weights = self.sums
        total = weights.sum()
        found = {"kept": kept.sum() / total, "most": most.sum() / total, "reached": kept / most}
        return {name: value.float() for name, value in found.items()}
