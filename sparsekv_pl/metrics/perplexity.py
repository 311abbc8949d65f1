"""Perplexity of continuations, with or without an eviction before them."""

from typing import Any

import torch
from torch import Tensor

from sparsekv_pl.metrics.additive import AdditiveMetric


class ContinuationPerplexity(AdditiveMetric):
    """exp(mean negative log-likelihood per supervised token), over all rows and ranks.

    >>> metric = ContinuationPerplexity()
    >>> metric.update(torch.log(torch.tensor([2.0, 8.0])))
    >>> metric.compute()
    tensor(4.)
    """

    higher_is_better = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """Add tokens: ``nll`` (N,) in nats."""
        self.nll += nll.double().sum().to(self.device)
        self.tokens += nll.numel()

    def compute(self) -> Tensor:
        """Return the perplexity, a scalar float32; 1 if no tokens were added."""
        return (self.nll / self.tokens.clamp(min=1)).exp().float()
