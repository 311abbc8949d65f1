"""Attention statistics written out over a full attention matrix, for tests."""

from typing import Any

import torch
from torch import Tensor

from sparsekv_pl.attention.statistics import LayerStatistics, StatisticsSettings


def states(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 8), (2, kv_heads, keys, 8)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def dense(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, T, S) attention."""
    (_, heads, queries, dim), seen = query.shape, key.shape[2]
    key = key.float().repeat_interleave(heads // key.shape[1], 1)
    logits = query.float() @ key.transpose(2, 3) * dim**-0.5
    visible = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1)


def expected(attention: Tensor, settings: StatisticsSettings, tokens: Tensor | None) -> LayerStatistics:
    """Compute all statistics from attention (B, H, T, S), query by query and block by block."""
    batch, heads, queries, seen = attention.shape
    observed = min(queries, settings.window or queries)
    attention = attention[:, :, queries - observed :]
    sparsity = torch.zeros(batch, heads, observed)
    for b in range(batch):
        for start in range(0, observed, settings.query_block):
            rows = list(range(start, min(start + settings.query_block, observed)))
            empty, blocks = torch.zeros(heads), 0
            for block in range(0, seen, settings.block_size):
                if block <= seen - observed + rows[-1]:
                    keys = slice(block, block + settings.block_size)
                    blocks += 1
                    empty += attention[b][:, rows][..., keys].sum((1, 2)) / len(rows) < settings.block_threshold
            sparsity[b, :, rows] = (empty / blocks)[:, None]
    return LayerStatistics(
        received=attention.sum(2),
        entropy=torch.special.entr(attention).sum(-1),
        top_k_coverage=attention.topk(min(settings.top_k, seen)).values.sum(-1),
        block_sparsity=sparsity,
        token_share=None if tokens is None else (attention * tokens[:, None, None]).sum(-1),
    )


def assert_equal(got: LayerStatistics, wanted: LayerStatistics) -> None:
    for name in ("entropy", "top_k_coverage", "block_sparsity", "token_share", "effective_support", "received"):
        values, reference = getattr(got, name), getattr(wanted, name)
        assert (values is None) == (reference is None)
        if values is not None:
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, reference, rtol=1e-4, atol=1e-4, msg=name)
