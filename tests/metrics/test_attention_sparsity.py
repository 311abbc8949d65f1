"""Sparsity by layer and head: means over queries, batches and ranks."""

import pickle

import pytest
import torch

from sparsekv_pl.attention.statistics import LayerStatistics, StatisticsSettings, attention_statistics
from sparsekv_pl.metrics import AttentionSparsity

NAMES = ["anchor_share", "block_sparsity", "effective_support", "top_k_coverage"]


def measured(seed: int, queries: int = 12) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    query, key = (3 * torch.randn(2, heads, queries, 8, generator=generator) for heads in (4, 2))
    settings = StatisticsSettings(top_k=3, block_size=4, block_threshold=0.1)
    tokens = torch.rand(2, queries, generator=generator) < 0.3
    return attention_statistics(query, key, settings, tokens=tokens)


def test_queries_count_equally_whatever_batch_they_came_in() -> None:
    batches = [measured(0), measured(1, queries=9)]
    metric = AttentionSparsity(layers=2, heads=4)
    for batch in batches:
        metric.update(1, batch)
    found = metric.compute()
    assert sorted(found) == NAMES
    for name, values in found.items():
        assert values.shape == (2, 4)
        assert values.dtype == torch.float32
        assert values[0].isnan().all(), "nothing was added to layer 0"
        attribute = "token_share" if name == "anchor_share" else name
        per_query = [getattr(batch, attribute).transpose(1, 2).flatten(0, 1) for batch in batches]
        assert sum(map(len, per_query)) == 2 * 12 + 2 * 9
        torch.testing.assert_close(values[1], torch.cat(per_query).mean(0), msg=name)


def test_two_ranks_equal_one() -> None:
    """Sum every state, as torchmetrics does when it gathers."""
    one, ranks = AttentionSparsity(2, 4), [AttentionSparsity(2, 4) for _ in range(2)]
    for step in range(4):
        one.update(step % 2, measured(step, queries=4 + step))
        ranks[step // 2].update(step % 2, measured(step, queries=4 + step))
    for name, reduce in ranks[0]._reductions.items():
        setattr(ranks[0], name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    torch.testing.assert_close(ranks[0].compute(), one.compute())


def test_without_a_token_set_there_is_no_share() -> None:
    metric = AttentionSparsity(1, 4)
    metric.update(0, attention_statistics(torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)))
    found = metric.compute()
    assert found["anchor_share"].isnan().all()
    assert found["effective_support"].tolist() == [[pytest.approx(2)] * 4]


@pytest.mark.parametrize("layer, heads", [(2, 4), (-1, 4), (0, 3)])
def test_another_models_statistics_are_refused(layer: int, heads: int) -> None:
    with pytest.raises(ValueError, match="do not fit AttentionSparsity"):
        AttentionSparsity(2, heads).update(layer, measured(0))


def test_it_pickles_and_resets() -> None:
    metric = AttentionSparsity(1, 4)
    metric.update(0, measured(0))
    copy = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(copy.compute(), metric.compute())
    metric.reset()
    assert metric.compute()["block_sparsity"].isnan().all()
