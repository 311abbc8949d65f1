"""Attention statistics equal the same written out over a full attention matrix, in memory that does not hold one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekv_pl.attention.statistics import StatisticsSettings, attention_statistics
from tests.attention.statistics_reference import assert_equal, dense, expected, states

SETTINGS = {
    "one tile": StatisticsSettings(top_k=5, block_size=8, block_threshold=0.05),
    "odd tiles": StatisticsSettings(top_k=5, block_size=7, block_threshold=0.05, query_tile=5, key_tile=10),
    "tiles of one": StatisticsSettings(window=5, top_k=3, block_size=1, block_threshold=0.01, query_tile=1, key_tile=1),
    "query blocks": StatisticsSettings(block_size=4, block_threshold=0.1, query_block=3, query_tile=4, key_tile=8),
    "more than there is": StatisticsSettings(window=500, top_k=500, block_size=500, query_block=500),
    "window": StatisticsSettings(window=6, top_k=4, block_size=5, block_threshold=0.1, query_tile=4, key_tile=5),
    "last query": StatisticsSettings(window=1, top_k=4, block_size=5, block_threshold=0.1),
}


@pytest.mark.parametrize("queries", [21, 8, 1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_everything_equals_a_full_matrix(settings: StatisticsSettings, queries: int) -> None:
    query, key = states(queries, 21)
    tokens = torch.arange(21).expand(2, -1) % 4 == 1
    got = attention_statistics(query, key, settings, tokens=tokens)
    assert_equal(got, expected(dense(query, key), settings, tokens))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(4, 4, torch.bfloat16), (4, 1, torch.float16), (6, 2, torch.float64)]
)
def test_groups_and_dtypes(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    query, key = states(20, 20, heads, kv_heads, dtype)
    settings = StatisticsSettings(top_k=4, block_size=4, query_tile=6, key_tile=8)
    assert_equal(attention_statistics(query, key, settings), expected(dense(query, key), settings, None))


def test_the_products_stay_in_float32_under_autocast() -> None:
    query, key = states(20, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_statistics(query, key)
    torch.testing.assert_close(got.entropy, attention_statistics(query, key).entropy, rtol=0, atol=0)


def test_peaked_attention_neither_overflows_nor_turns_nan() -> None:
    """Logits of 10,000: one key takes everything."""
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    query[..., 0], key[0, 0, 0, 0] = 1e4, 3.0
    got = attention_statistics(query, key, StatisticsSettings(block_size=1, key_tile=1))
    assert got.entropy.abs().max() == 0
    assert got.effective_support.tolist() == [[[1, 1, 1, 1]]]
    assert got.received.tolist() == [[[4, 0, 0, 0]]]
    assert got.block_sparsity[0, 0].tolist() == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])


@pytest.mark.parametrize("queries", [1, 3])
def test_the_heaviest_keys_of_many(queries: int) -> None:
    """Contexts so long that the heaviest keys are looked for in parts; many keys are equally heavy."""
    query, key = states(queries, 1003)
    key = key.round()
    for top_k in (1, 5, 100, 1003):
        got = attention_statistics(query, key, StatisticsSettings(top_k=top_k)).top_k_coverage
        wanted = dense(query, key).topk(top_k).values.sum(-1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_even_attention_by_hand() -> None:
    """Equal logits: query t spreads over t + 1 keys."""
    query, key = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8)
    tokens = torch.tensor([[True, False, False, True]])
    got = attention_statistics(
        query, key, StatisticsSettings(top_k=2, block_threshold=0.3, block_size=2), tokens=tokens
    )
    for head in range(2):
        assert got.effective_support[0, head].tolist() == pytest.approx([1, 2, 3, 4])
        assert got.top_k_coverage[0, head].tolist() == pytest.approx([1, 1, 2 / 3, 1 / 2])
        assert got.token_share is not None
        assert got.token_share[0, head].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 2 / 4])
        assert got.block_sparsity[0, head].tolist() == [0, 0, 0, 0]  # the third query's second block holds 1/3
        assert got.received[0, head].tolist() == pytest.approx([1 + 1 / 2 + 1 / 3 + 1 / 4, 13 / 12, 7 / 12, 1 / 4])
        assert got.received_by_block(3)[0, head].tolist() == pytest.approx([4 - 1 / 4, 1 / 4])
    assert got.mean(got.effective_support).tolist() == [pytest.approx([2.5, 2.5])]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def largest(tokens: int, **settings: Any) -> int:
    with Largest() as seen:
        attention_statistics(*states(tokens, tokens), StatisticsSettings(**settings))
    return seen.elements


def test_no_tensor_grows_with_the_square_of_the_context() -> None:
    small = {"query_tile": 8, "key_tile": 64, "top_k": 4, "block_size": 32}
    assert largest(512, **small) == 2 * 4 * 512 * 8  # the queries; a tile of two heads has 2 * 8 * 64 elements
    assert largest(1024) == 2 * 32 * 8192  # the default tile
    assert largest(128) == 2 * 128 * 128  # the counter does count


@pytest.mark.parametrize(
    "change",
    [
        {"key": (2, 3, 9, 8)},
        {"key": (1, 2, 9, 8)},
        {"key": (2, 2, 9, 4)},
        {"key": (2, 2, 8, 8)},
        {"query": (2, 4, 0, 8)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]]) -> None:
    shapes = {"query": (2, 4, 9, 8), "key": (2, 2, 9, 8)} | change
    with pytest.raises(ValueError, match="do not fit"):
        attention_statistics(torch.zeros(shapes["query"]), torch.zeros(shapes["key"]))


def test_a_token_set_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 8\)"):
        attention_statistics(*states(9, 9), tokens=torch.ones(2, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    "setting", [{"window": 0}, {"top_k": 0}, {"block_size": 0}, {"query_block": -1}, {"block_threshold": 0.0}]
)
def test_settings_without_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        StatisticsSettings(**setting)
