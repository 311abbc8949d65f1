"""Perplexity and per-case values: numbers, order, repeats, reduction over ranks."""

import pickle
from typing import Any

import pytest
import torch

from sparsekv_pl.metrics import CaseValues, ContinuationPerplexity


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


def test_ranks_add_up() -> None:
    """What torchmetrics does when it gathers: sum for perplexity, concatenation for cases."""
    over_ranks: dict[str, Any] = {**ContinuationPerplexity()._reductions, **CaseValues()._reductions}
    assert over_ranks["nll"](torch.tensor([1.0, 2.0])) == 3
    assert over_ranks["tokens"](torch.tensor([10, 20])) == 30
    assert over_ranks["value"]([torch.ones(1), torch.zeros(1)]).tolist() == [1, 0]


def test_cases_come_back_in_order_and_once() -> None:
    metric = CaseValues()
    metric.update(torch.tensor([7, 3]), torch.tensor([0.7, 0.3]), torch.tensor([70, 30]))
    metric.update(torch.tensor([5, 3]), torch.tensor([0.5, 0.9]), torch.tensor([50, 90]))
    values, counts = metric.compute()
    assert values.tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert counts.tolist() == [30, 50, 70]


def test_no_cases_are_tensors_that_ranks_can_gather() -> None:
    metric = CaseValues()
    metric.update(torch.tensor([7]), torch.tensor([0.7]), torch.tensor([70]))
    metric.reset()
    for none in (metric, CaseValues()):
        states = (none.index, none.value, none.count)
        assert [[(len(part), part.dtype) for part in state] for state in states] == [
            [(0, torch.int64)],
            [(0, torch.float64)],
            [(0, torch.int64)],
        ]
        assert [len(part) for part in none.compute()] == [0, 0]


@pytest.mark.parametrize("metric", [CaseValues, ContinuationPerplexity])
def test_metrics_pickle(metric: type) -> None:
    assert isinstance(pickle.loads(pickle.dumps(metric())), metric)
