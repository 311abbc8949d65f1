"""The requirements of torchmetrics: keywords, merging, plotting, forward, cloning, pickling, wrappers."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from sparsekv_pl import metrics
from sparsekv_pl.attention.statistics import LayerStatistics
from sparsekv_pl.metrics import (
    AttentionSparsity,
    ContinuationPerplexity,
    MassByHead,
)

Updates = list[tuple[Any, ...]]


def layer_statistics(seed: int) -> LayerStatistics:
    def values() -> torch.Tensor:
        return torch.rand(2, 3, 4, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    return LayerStatistics(
        received=torch.rand(2, 3, 8, generator=generator),
        entropy=values(),
        top_k_coverage=values(),
        block_sparsity=values(),
        token_share=values(),
    )


CASES: dict[str, tuple[Callable[..., Metric], Updates]] = {
    "ContinuationPerplexity": (ContinuationPerplexity, [(torch.rand(5),), (torch.rand(3),)]),
    "MassByHead": (
        lambda **keywords: MassByHead(2, 3, **keywords),
        [(0, *torch.rand(3, 4, 3)), (1, *torch.rand(3, 2, 3))],
    ),
    "AttentionSparsity": (
        lambda **keywords: AttentionSparsity(2, 3, **keywords),
        [(0, layer_statistics(0)), (1, layer_statistics(1))],
    ),
}


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, equal_nan=True)


def after(make: Callable[..., Metric], updates: Updates, **keywords: Any) -> Metric:
    metric = make(**keywords)
    for update in updates:
        metric.update(*update)
    return metric


def test_every_metric_is_looked_at() -> None:
    found = {name for name in metrics.__all__ if isinstance(getattr(metrics, name), type)}
    assert found == set(CASES)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Metric], Updates]:
    return CASES[request.param]


def test_takes_torchmetrics_keywords(case: tuple[Callable[..., Metric], Updates]) -> None:
    make, updates = case
    keywords = {
        "compute_on_cpu": True,
        "dist_sync_on_step": False,
        "sync_on_compute": False,
        "compute_with_cache": False,
    }
    same(after(make, updates, **keywords).compute(), after(make, updates).compute())
    with pytest.raises(ValueError, match="Unexpected keyword"):
        make(no_such_keyword=1)


def test_merging_is_updating_with_both(case: tuple[Callable[..., Metric], Updates]) -> None:
    make, updates = case
    merged = after(make, updates[:1])
    merged.merge_state(after(make, updates[1:]))
    same(merged.compute(), after(make, updates).compute())


def test_forward_gives_the_batchs_value_and_adds_it(case: tuple[Callable[..., Metric], Updates]) -> None:
    make, updates = case
    metric = make()
    for update in updates:
        same(metric(*update), after(make, [update]).compute())
    same(metric.compute(), after(make, updates).compute())
    metric.reset()
    same(metric.compute(), make().compute())


def test_survives_copies_state_dicts_and_dtypes(case: tuple[Callable[..., Metric], Updates]) -> None:
    make, updates = case
    metric = after(make, updates)
    metric.persistent(True)
    loaded = make()
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    loaded._update_count = 1
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric)), loaded, metric.half()):
        same(copy.compute(), after(make, updates).compute())
    assert hash(make()) != hash(metric)
