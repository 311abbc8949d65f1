"""Perplexity and KL: numbers, reduction over ranks."""

import math
import pickle
from typing import Any

import pytest
import torch

from sparsekv_pl.metrics import ContinuationPerplexity, PerplexityAndKL


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


def test_perplexity_and_kl_are_weighted_by_tokens() -> None:
    metric = PerplexityAndKL()
    assert metric.compute() == {}
    metric.update({"nll": 2.0, "kl": 0.5, "tokens": 1})
    metric.update({"nll": 4.0, "kl": 1.0, "tokens": 5})
    scores = metric.compute()
    assert scores["perplexity"] == pytest.approx(math.e)
    assert scores["kl"] == pytest.approx(0.25)


def test_ranks_add_up() -> None:
    """What torchmetrics does when it gathers."""
    over_ranks: dict[str, Any] = {**ContinuationPerplexity()._reductions, **PerplexityAndKL()._reductions}
    assert over_ranks["nll"](torch.tensor([1.0, 2.0])) == 3
    assert over_ranks["tokens"](torch.tensor([10, 20])) == 30
    assert over_ranks["sums"](torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist() == [5, 7, 9]


@pytest.mark.parametrize("metric", [PerplexityAndKL, ContinuationPerplexity])
def test_metrics_pickle(metric: type) -> None:
    assert isinstance(pickle.loads(pickle.dumps(metric())), metric)
