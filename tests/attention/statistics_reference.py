"""Attention statistics written out over a full attention matrix, for tests."""

from typing import Any

import torch
from torch import Tensor

from sparsekv_pl.attention.statistics import LayerStatistics, StatisticsSettings


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
    """Compute all statistics from attention (B, H, T, S), query by query and block by block."""
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
