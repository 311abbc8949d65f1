"""One token's attention over blocks equals the last row of the full matrix; a planted block is found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.analysis.hot_blocks import HotBlocks, block_mass
from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.eviction.prefill import continue_from

Build = Callable[..., PreTrainedModel]


def by_block(row: Tensor, context_tokens: int, block_size: int) -> Tensor:
    """(..., S) -> (..., N), block by block."""
    starts = range(0, context_tokens, block_size)
    return torch.stack([row[..., at : min(at + block_size, context_tokens)].sum(-1) for at in starts], dim=-1)


def last_row(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(B, H, S) of the last query, written out."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    return ((query.float() @ key.transpose(2, 3))[:, :, -1] * scaling).softmax(-1)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("context_tokens, block_size", [(32, 8), (29, 8), (29, 100), (37, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mass_equals_a_full_row(
    heads: int, kv_heads: int, context_tokens: int, block_size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 37, 8, generator=generator).to(dtype) * 2 for n in (heads, kv_heads))
    got = block_mass(query[:, :, -1], key, context_tokens, block_size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_block(last_row(query, key, 8**-0.5), context_tokens, block_size))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_mass(query[:, :, -1], key, context_tokens, block_size), got)


def test_a_planted_block_is_found_by_its_head() -> None:
    """Two keys of block 3 point where head 1's last query points, so strongly that nothing else counts."""
    query, key = torch.zeros(1, 4, 20, 8), torch.zeros(1, 2, 20, 8)
    query[0, 1, -1, 0], key[0, 0, 13:15, 0] = 100.0, 5.0
    hot = HotBlocks(context_tokens=16, block_size=4)
    hot(0, query, key, key)
    mass = hot.mass[0, 0]
    assert mass[1].tolist() == pytest.approx([0, 0, 0, 1])
    for head in (0, 2, 3):  # zeros look everywhere alike: 4 of 20 keys are in each block, 4 in none
        assert mass[head].tolist() == pytest.approx([0.2] * 4)


@torch.no_grad()
@pytest.mark.parametrize("loaded_with", ["eager", "sdpa", "flex_attention"])
def test_an_observer_sees_what_eager_attention_gives(random_model: Build, loaded_with: str) -> None:
    model = random_model(num_hidden_layers=3)
    ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    with attention_implementation(model, "eager"):
        attentions = model(input_ids=ids, output_attentions=True).attentions
    hot = HotBlocks(context_tokens=25, block_size=8)
    with attention_implementation(model, loaded_with):
        continue_from(model, ids, DynamicCache(), 0, observer=hot)
    expected = torch.stack([by_block(attention[:, :, -1], 25, 8) for attention in attentions], dim=1)
    assert hot.mass.shape == (2, 3, 4, 4)
    torch.testing.assert_close(hot.mass, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="layer 0 was measured already"):
        continue_from(model, ids, DynamicCache(), 0, observer=hot)


@torch.no_grad()
def test_the_last_chunk_alone_is_enough(random_model: Build) -> None:
    model, cache = random_model(), DynamicCache()
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    whole, chunk = HotBlocks(20, 8), HotBlocks(20, 8)
    continue_from(model, ids, DynamicCache(), 0, observer=whole)
    continue_from(model, ids[:, :18], cache, 0)
    continue_from(model, ids[:, 18:], cache, 18, observer=chunk)
    torch.testing.assert_close(chunk.mass, whole.mass)


def test_an_evicted_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="9 keys but the context has 10 tokens"):
        block_mass(torch.zeros(1, 2, 8), torch.zeros(1, 2, 9, 8), 10, 4)
