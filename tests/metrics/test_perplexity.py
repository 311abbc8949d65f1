"""Perplexity: numbers."""

import pytest
import torch

from sparsekv_pl.metrics import ContinuationPerplexity


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens() -> None:
    metric = ContinuationPerplexity()
    metric.update(torch.tensor([1.0, 2.0, 3.0]))
    metric.update(torch.tensor([4.0]))
    assert metric.compute() == pytest.approx(torch.tensor(2.5).exp())
    metric.reset()
    assert metric.compute() == 1


def test_perplexity_sums_in_float64() -> None:
    metric = ContinuationPerplexity()
    metric.update(torch.full((1,), 2.0**24))
    metric.update(torch.ones(1, dtype=torch.bfloat16))
    assert metric.nll == 2.0**24 + 1
