"""Attention statistics equal the same written out over a full attention matrix, in memory that does not hold one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.cached import attention_implementation
from sparsekv_pl.attention.statistics import (
    AttentionStatistics,
    LayerStatistics,
    StatisticsSettings,
    attention_statistics,
)
from sparsekv_pl.eviction.prefill import continue_from

Build = Callable[..., PreTrainedModel]


def states(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 8), (2, kv_heads, keys, 8)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def dense(query: Tensor, key: Tensor, valid: Tensor | None, scaling: float | None = None) -> Tensor:
    """(B, H, T, S) attention, 0 in rows that are padding."""
    (batch, heads, queries, dim), seen = query.shape, key.shape[2]
    key = key.float().repeat_interleave(heads // key.shape[1], 1)
    logits = query.float() @ key.transpose(2, 3) * (scaling or dim**-0.5)
    valid = torch.ones(batch, seen, dtype=torch.bool) if valid is None else valid
    visible = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries) & valid[:, None, None]
    visible = visible & valid[:, None, seen - queries :, None]
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)


def expected(
    attention: Tensor, settings: StatisticsSettings, valid: Tensor | None, tokens: Tensor | None
) -> LayerStatistics:
    """Everything from attention (B, H, T, S), query by query and block by block."""
    batch, heads, queries, seen = attention.shape
    observed = min(queries, settings.window or queries)
    attention = attention[:, :, queries - observed :]
    counted = (torch.ones(batch, seen, dtype=torch.bool) if valid is None else valid)[:, seen - observed :]
    sparsity = torch.zeros(batch, heads, observed)
    for b in range(batch):
        for start in range(0, observed, settings.query_block):
            rows = [t for t in range(start, min(start + settings.query_block, observed)) if counted[b, t]]
            empty, blocks = torch.zeros(heads), 0
            for block in range(0, seen, settings.block_size):
                keys = list(range(block, min(block + settings.block_size, seen)))
                if any(k <= seen - observed + t and (valid is None or valid[b, k]) for t in rows for k in keys):
                    blocks += 1
                    empty += attention[b][:, rows][..., keys].sum((1, 2)) / len(rows) < settings.block_threshold
            sparsity[b, :, rows] = (empty / max(blocks, 1))[:, None]
    return LayerStatistics(
        received=attention.sum(2),
        entropy=torch.special.entr(attention).sum(-1),
        top_k_coverage=attention.topk(min(settings.top_k, seen)).values.sum(-1),
        block_sparsity=sparsity,
        token_share=None if tokens is None else (attention * tokens[:, None, None]).sum(-1),
        counted=counted,
    )


def assert_equal(got: LayerStatistics, wanted: LayerStatistics) -> None:
    assert torch.equal(got.counted, wanted.counted)
    rows = got.counted[:, None].expand_as(got.entropy)
    for name in ("entropy", "top_k_coverage", "block_sparsity", "token_share", "effective_support"):
        values, reference = getattr(got, name), getattr(wanted, name)
        assert (values is None) == (reference is None)
        if values is not None:
            assert values.dtype == torch.float32
            torch.testing.assert_close(values[rows], reference[rows], rtol=1e-4, atol=1e-4, msg=name)
            assert bool((values[~rows] == 0).all()), name
    torch.testing.assert_close(got.received, wanted.received, rtol=1e-4, atol=1e-4)


SETTINGS = {
    "one tile": StatisticsSettings(top_k=5, block_size=8, block_threshold=0.05),
    "odd tiles": StatisticsSettings(top_k=5, block_size=7, block_threshold=0.05, query_tile=5, key_tile=10),
    "tiles of one": StatisticsSettings(window=5, top_k=3, block_size=1, block_threshold=0.01, query_tile=1, key_tile=1),
    "query blocks": StatisticsSettings(block_size=4, block_threshold=0.1, query_block=3, query_tile=4, key_tile=8),
    "more than there is": StatisticsSettings(window=500, top_k=500, block_size=500, query_block=500),
    "window": StatisticsSettings(window=6, top_k=4, block_size=5, block_threshold=0.1, query_tile=4, key_tile=5),
    "last query": StatisticsSettings(window=1, top_k=4, block_size=5, block_threshold=0.1),
}


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("queries, keys", [(21, 21), (8, 21), (1, 21)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_everything_equals_a_full_matrix(settings: StatisticsSettings, queries: int, keys: int, padding: str) -> None:
    query, key = states(queries, keys)
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[1] = {
        "none": True,
        "left": torch.arange(keys) >= 6,
        "right": torch.arange(keys) < keys - 4,
        "holes": torch.arange(keys) % 3 > 0,
    }[padding]
    mask = None if padding == "none" else valid
    tokens = torch.arange(keys).expand(2, -1) % 4 == 1
    got = attention_statistics(query, key, settings, tokens=tokens, valid=mask)
    assert_equal(got, expected(dense(query, key, mask), settings, mask, tokens))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_groups_and_dtypes(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    query, key = states(20, 20, heads, kv_heads, dtype)
    settings = StatisticsSettings(top_k=4, block_size=4, query_tile=6, key_tile=8)
    assert_equal(attention_statistics(query, key, settings), expected(dense(query, key, None), settings, None, None))


def test_the_products_stay_in_float32_under_autocast() -> None:
    query, key = states(20, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_statistics(query, key)
    torch.testing.assert_close(got.entropy, attention_statistics(query, key).entropy, rtol=0, atol=0)


def test_scaling_is_that_of_the_model() -> None:
    query, key = states(9, 9)
    settings = StatisticsSettings()
    got = attention_statistics(query, key, settings, scaling=1.0)
    assert_equal(got, expected(dense(query, key, None, 1.0), settings, None, None))


def test_peaked_attention_neither_overflows_nor_turns_nan() -> None:
    """Logits of 10,000: one key takes everything."""
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    query[..., 0], key[0, 0, 0, 0] = 1e4, 3.0
    got = attention_statistics(query, key, StatisticsSettings(block_size=1, key_tile=1))
    assert got.entropy.abs().max() == 0
    assert got.effective_support.tolist() == [[[1, 1, 1, 1]]]
    assert got.received.tolist() == [[[4, 0, 0, 0]]]
    assert got.block_sparsity[0, 0].tolist() == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])


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


def test_means_leave_padding_out() -> None:
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    valid = torch.tensor([[False, True, True, True]])
    got = attention_statistics(query, key, valid=valid)
    assert got.mean(got.effective_support).item() == pytest.approx(2)
    assert got.effective_support[0, 0, 0] == 0


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
    small = {"query_tile": 16, "key_tile": 32, "top_k": 8, "block_size": 16}
    assert largest(512, **small) == 2 * 4 * 512 * 8  # the queries; a tile has 2 * 4 * 16 * 32 elements
    assert largest(512) == 2 * 4 * 512 * 64  # a strip of the default 64 queries
    assert largest(128, query_tile=128) == 2 * 4 * 128 * 128  # the counter does count


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
        assert_equal(observer.layers[layer], expected(attention, settings, None, tokens))
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


@pytest.mark.parametrize("name", ["tokens", "valid"])
def test_masks_of_another_length_are_refused(name: str) -> None:
    mask: dict[str, Any] = {name: torch.ones(2, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 8\)"):
        attention_statistics(*states(9, 9), **mask)


@pytest.mark.parametrize(
    "setting", [{"window": 0}, {"top_k": 0}, {"block_size": 0}, {"query_block": -1}, {"block_threshold": 0.0}]
)
def test_settings_without_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        StatisticsSettings(**setting)
