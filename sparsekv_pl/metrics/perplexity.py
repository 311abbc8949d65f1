"""Perplexity of continuations, with or without an eviction before them."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ContinuationPerplexity(Metric):
    """exp(mean negative log-likelihood per supervised token), over all rows and ranks.

    >>> metric = ContinuationPerplexity()
    >>> metric.update(torch.log(torch.tensor([2.0, 8.0])))
    >>> metric.compute()
    tensor(4.)
    """

    higher_is_better = False
    is_differentiable = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """Add tokens: ``nll`` (N,) in nats."""
        self.nll += nll.double().sum()
        self.tokens += nll.numel()

    def compute(self) -> Tensor:
        """Scalar float32; 1 where nothing was added."""
        return (self.nll / self.tokens.clamp(min=1)).exp().float()
