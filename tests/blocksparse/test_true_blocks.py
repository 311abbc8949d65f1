"""Attention pooled to blocks equals the pooled full matrix, with less memory than that matrix."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekv_pl.attention.blocks import TopBlocks, block_count, threshold_blocks, visible_blocks
from sparsekv_pl.blocksparse.true_blocks import TrueBlocks, block_attention


def states(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, heads, queries, 8, generator=generator)
    key = 2 * torch.randn(2, kv_heads, keys, 8, generator=generator)
    return query.to(dtype), key.to(dtype)


def dense(query: Tensor, key: Tensor, scaling: float | None = None) -> Tensor:
    """(B, H, T, S) attention."""
    queries, keys = query.shape[2], key.shape[2]
    logits = query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return (logits * (scaling or query.shape[-1] ** -0.5)).masked_fill(~visible, -torch.inf).softmax(-1)


def pooled(attention: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mass and peak of (B, H, T, S), pair of blocks by pair of blocks."""
    queries, keys = attention.shape[2:]
    blocks, first = block_count(keys, size), (keys - queries) // size
    mass, peak = (torch.zeros(*attention.shape[:2], blocks - first, blocks) for _ in range(2))
    for row in range(first, blocks):
        rows = [t for t in range(queries) if (keys - queries + t) // size == row]
        for column in range(blocks):
            pair = attention[:, :, rows, column * size : (column + 1) * size]
            mass[:, :, row - first, column] = pair.sum((2, 3)) / len(rows)
            peak[:, :, row - first, column] = pair.amax((2, 3))
    return mass, peak


@pytest.mark.parametrize("size, tile", [(8, 64), (8, 8), (8, 5), (5, 3), (1, 4), (64, 7)])
@pytest.mark.parametrize("queries, keys", [(32, 32), (29, 29), (11, 29), (1, 29), (1, 1), (13, 32)])
def test_mass_and_peak_equal_the_full_matrix_pooled(queries: int, keys: int, size: int, tile: int) -> None:
    query, key = states(queries, keys)
    got = block_attention(query, key, size, query_tile=tile)
    mass, peak = pooled(dense(query, key), size)
    torch.testing.assert_close(got.mass, mass)
    torch.testing.assert_close(got.peak, peak)
    torch.testing.assert_close(got.mass.sum(-1), torch.ones(got.mass.shape[:3]))
    assert bool((got.mass[..., ~visible_blocks(queries, keys, size)] == 0).all())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(4, 4, torch.bfloat16), (4, 1, torch.float16), (6, 2, torch.float64)]
)
def test_groups_and_dtypes(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    query, key = states(20, 20, heads, kv_heads, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = block_attention(query, key, 8)
    mass, peak = pooled(dense(query, key), 8)
    assert got.mass.dtype == got.peak.dtype == torch.float32
    torch.testing.assert_close(got.mass, mass)
    torch.testing.assert_close(got.peak, peak)


def test_large_logits_stay_finite() -> None:
    query, key = states(24, 24)
    got = block_attention(query * 100, key * 100, 8)
    torch.testing.assert_close(got.mass, pooled(dense(query * 100, key * 100), 8)[0])


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside the block has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_no_tensor_grows_with_the_square_of_the_context() -> None:
    most = []
    for keys in (512, 1024):
        query, key = states(keys, keys)
        with Largest() as largest:
            block_attention(query, key, 128, query_tile=32)
        most.append(largest.numbers)
    assert most == [2 * 4 * 32 * 512, 2 * 4 * 32 * 1024]


def test_bad_shapes_and_settings_are_named() -> None:
    query, key = states(8, 8)
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\) and keys \(2, 2, 7, 8\)"):
        block_attention(query, key[:, :, 1:], 4)
    with pytest.raises(ValueError, match="block_size=0"):
        block_attention(query, key, 0)
    with pytest.raises(ValueError, match="query_tile=0"):
        block_attention(query, key, 4, query_tile=0)


# --- as a scorer ---


def test_the_scores_are_the_pooled_truth_per_head() -> None:
    query, key = states(11, 29)
    torch.testing.assert_close(TrueBlocks(8)(0, query, key), pooled(dense(query, key), 8)[0])
    scaled = pooled(dense(query, key, 0.1), 8)[0]
    torch.testing.assert_close(TrueBlocks(8)(0, query * 0.1 * query.shape[-1] ** 0.5, key), scaled)


def test_a_planted_block_is_selected() -> None:
    query, key = torch.zeros(1, 2, 32, 8), torch.zeros(1, 1, 32, 8)
    query[:, 1, 24:, 0], key[:, 0, 10, 0] = 10, 10  # head 1's last block looks at key 10, head 0 at nothing
    scorer = TrueBlocks(4)
    assert TopBlocks(scorer, 3)(0, query, key).indices[0, 1, -1].tolist() == [0, 2, 7]  # type: ignore[union-attr]
    threshold = threshold_blocks(scorer(0, query, key), 0.5, 4, keys=32)
    assert threshold.indices[0, 1, -1].tolist() == [0, 2, 7]
    assert threshold.indices[0, 0, -1].tolist() == [0, 7, -1]
