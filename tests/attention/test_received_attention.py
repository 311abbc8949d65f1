"""Received attention equals sums over a full attention matrix, pair by pair."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention import received_attention as received
from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.received_attention import (
    ReceivedAttention,
    carrying_share,
    distance_edges,
    exposure,
    received_attention,
)
from sparsekv_pl.eviction.prefill import continue_from

GROUPS = 3


def states(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 8), (2, kv_heads, keys, 8)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def groups(keys: int) -> Tensor:
    return torch.randint(0, GROUPS, (2, keys), generator=torch.Generator().manual_seed(1))


def dense(query: Tensor, key: Tensor, scaling: float | None = None) -> Tensor:
    """(B, H, T, S)"""
    queries, keys = query.shape[2], key.shape[2]
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.float() @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    return logits.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries), -torch.inf).softmax(-1)


def by_group(attention: Tensor, groups: Tensor) -> Tensor:
    """(B, H, G, bins), pair by pair."""
    batch, heads, queries, keys = attention.shape
    edges = distance_edges(keys)
    total = torch.zeros(batch, heads, GROUPS, len(edges) - 1)
    for q in range(queries):
        for k in range(keys - queries + q + 1):
            distance = keys - queries + q - k
            place = next(n for n in range(len(edges) - 1) if edges[n] <= distance < edges[n + 1])
            for b in range(batch):
                total[b, :, groups[b, k], place] += attention[b, :, q, k]
    return total


@pytest.mark.parametrize("strip", [64, 5, 1])
@pytest.mark.parametrize("queries, keys", [(21, 21), (8, 21), (1, 21), (1, 1)])
def test_it_equals_a_full_matrix(queries: int, keys: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "STRIP_QUERIES", strip)
    query, key = states(queries, keys)
    got = received_attention(query, key, groups(keys), GROUPS)
    attention = dense(query, key)
    torch.testing.assert_close(got.by_key, attention.sum(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.by_group, by_group(attention, groups(keys)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_groups_of_heads_and_dtypes(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    query, key = states(20, 20, heads, kv_heads, dtype)
    got = received_attention(query, key, groups(20), GROUPS)
    torch.testing.assert_close(got.by_key, dense(query, key).sum(2), rtol=1e-4, atol=1e-5)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_sums_are_float32_whatever_precision_a_run_has() -> None:
    query, key = states(40, 40)
    wanted, seen = received_attention(query, key, groups(40), GROUPS), exposure(groups(40), GROUPS)
    with default_dtype(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        got, again = received_attention(query, key, groups(40), GROUPS), exposure(groups(40), GROUPS)
    assert torch.equal(got.by_key, wanted.by_key) and torch.equal(got.by_group, wanted.by_group)
    assert torch.equal(again.chance, seen.chance) and torch.equal(again.last, seen.last)


@pytest.mark.parametrize("strip", [64, 4])
def test_exposure_equals_counting(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "STRIP_QUERIES", strip)
    keys = 19
    visible = torch.ones(keys, keys).tril()
    even = visible / visible.sum(-1, keepdim=True)
    got = exposure(groups(keys), GROUPS)
    torch.testing.assert_close(got.pairs, by_group(visible.expand(2, 1, -1, -1), groups(keys))[:, 0])
    torch.testing.assert_close(got.chance, by_group(even.expand(2, 1, -1, -1), groups(keys))[:, 0])
    torch.testing.assert_close(got.last, by_group(torch.ones(2, 1, 1, keys), groups(keys))[:, 0])
    torch.testing.assert_close(got.pairs_by_key, torch.arange(keys, 0.0, -1))
    torch.testing.assert_close(got.chance_by_key, even.sum(0))
    assert got.last.sum((1, 2)).tolist() == [keys, keys]


def test_attention_spread_evenly_is_chance() -> None:
    got = received_attention(torch.zeros(2, 4, 30, 8), torch.zeros(2, 2, 30, 8), groups(30), GROUPS)
    torch.testing.assert_close(got.by_group, exposure(groups(30), GROUPS).chance[:, None].expand(-1, 4, -1, -1))


def test_the_observer_sees_what_eager_attention_computes(random_model: Callable[..., PreTrainedModel]) -> None:
    model = random_model()
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(2))
    observer = ReceivedAttention(groups(17), GROUPS)
    with torch.no_grad():
        continue_from(model, ids, DynamicCache(), 0, observer=observer)
        with attention_implementation(model, "eager"):
            attentions = model(ids, output_attentions=True).attentions
    assert sorted(observer.layers) == [0, 1]
    for layer, attention in enumerate(attentions):
        torch.testing.assert_close(observer.layers[layer].by_key, attention.sum(2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            observer.layers[layer].by_group, by_group(attention, groups(17)), rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match="layer 0 was observed already"):
        observer(0, *states(17, 17), torch.empty(0))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_square_of_the_length_is_ever_held() -> None:
    length = 1024
    query, key = torch.randn(1, 2, length, 4), torch.randn(1, 1, length, 4)
    kinds = torch.zeros(1, length, dtype=torch.int64)
    with Largest() as largest:
        received_attention(query, key, kinds, 2)
        exposure(kinds, 2)
    assert largest.elements <= 2 * received.STRIP_QUERIES * length
    assert 0 < largest.elements < length**2 / 4


def test_a_strip_of_a_long_context_has_fewer_queries() -> None:
    assert list(received._strips(3, received.STRIP_FLOATS)) == [(0, 1), (1, 2), (2, 3)]
    assert list(received._strips(3, 10 * received.STRIP_FLOATS)) == [(0, 1), (1, 2), (2, 3)]
    assert list(received._strips(100, 1)) == [(0, 64), (64, 100)]


def test_the_carrying_share_is_the_fewest_tokens() -> None:
    by_key = torch.tensor([[10.0, 1, 1, 1, 7], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(carrying_share(by_key, 0.8), torch.tensor([2 / 5, 4 / 5], dtype=torch.float64))
    torch.testing.assert_close(carrying_share(by_key, 1.0), torch.tensor([1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(carrying_share(by_key, 0.5), torch.tensor([1 / 5, 3 / 5], dtype=torch.float64))


@pytest.mark.parametrize(
    ("query", "key", "kinds", "message"),
    [
        ((1, 4, 5, 8), (1, 2, 5, 8), torch.zeros(1, 4, dtype=torch.int64), "do not fit"),
        ((1, 4, 6, 8), (1, 2, 5, 8), torch.zeros(1, 5, dtype=torch.int64), "do not fit"),
        ((1, 3, 5, 8), (1, 2, 5, 8), torch.zeros(1, 5, dtype=torch.int64), "do not fit"),
        ((1, 4, 5, 8), (1, 2, 5, 8), torch.full((1, 5), 3), "groups go from 3 to 3: give every key"),
        ((1, 4, 5, 8), (1, 2, 5, 8), torch.full((1, 5), -1), "groups go from -1 to -1"),
    ],
)
def test_what_does_not_fit_is_named(query: Any, key: Any, kinds: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        received_attention(torch.zeros(query), torch.zeros(key), kinds, GROUPS)
