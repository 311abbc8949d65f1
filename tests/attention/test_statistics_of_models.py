"""Observed passes of a model, whole, padded and in chunks, against the attention that transformers' eager returns."""

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.statistics import AttentionStatistics, StatisticsSettings
from sparsekv_pl.eviction.prefill import continue_from
from tests.attention.statistics_reference import assert_equal, expected, states

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@torch.no_grad()
def test_an_observer_measures_every_layer_of_a_pass(random_model: Build) -> None:
    model, settings = random_model(), StatisticsSettings(top_k=4, block_size=8, query_tile=7)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens = ids % 5 == 0
    observer = AttentionStatistics(settings, tokens=tokens)
    continue_from(model, ids, DynamicCache(), 0, observer=observer)
    with attention_implementation(model, "eager"):
        attentions = model(input_ids=ids, output_attentions=True).attentions
    assert sorted(observer.layers) == [0, 1]
    for layer, attention in enumerate(attentions):
        assert_equal(observer.layers[layer], expected(attention, settings, tokens))
    with pytest.raises(ValueError, match="layer 0 was measured already"):
        continue_from(model, ids, DynamicCache(), 0, observer=observer)


@torch.no_grad()
def test_the_last_chunk_alone_equals_a_window_of_the_whole(random_model: Build) -> None:
    model, cache = random_model(), DynamicCache()
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    whole, chunk = AttentionStatistics(StatisticsSettings(window=6)), AttentionStatistics()
    continue_from(model, ids, DynamicCache(), 0, observer=whole)
    continue_from(model, ids[:, :18], cache, 0)
    continue_from(model, ids[:, 18:], cache, 18, observer=chunk)
    for layer in (0, 1):
        assert_equal(chunk.layers[layer], whole.layers[layer])


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_chunks_add_up_to_the_whole(random_model: Build, window: int | None) -> None:
    model, cache = random_model(), DynamicCache()
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    settings = StatisticsSettings(window=window, top_k=4, block_size=5, query_block=3, key_tile=5)
    whole, chunks = (AttentionStatistics(settings, tokens=ids % 5 == 0) for _ in range(2))
    continue_from(model, ids, DynamicCache(), 0, observer=whole)
    for start, stop in ((0, 9), (9, 15), (15, 24)):
        continue_from(model, ids[:, start:stop], cache, start, observer=chunks)
    for layer in (0, 1):
        assert_equal(chunks.layers[layer], whole.layers[layer])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"window": 5}, "window=5 is longer"), ({"query_block": 4}, "multiple of query_block=4")],
)
def test_chunks_that_cut_what_belongs_together_are_refused(settings: dict[str, int], complaint: str) -> None:
    query, key = states(10, 10)
    observer = AttentionStatistics(StatisticsSettings(**settings))
    observer(0, query[:, :, :6], key[:, :, :6], key)
    with pytest.raises(ValueError, match=complaint):
        observer(0, query[:, :, 6:], key, key)
