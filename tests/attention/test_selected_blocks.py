"""A selector in real forward passes: prefill, continuation and decoding attend to the selected blocks alone."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.blocks import Blocks, blocks_of, visible_blocks
from sparsekv_pl.attention.evicted_attention import passing
from sparsekv_pl.eviction.prefill import continue_from
from tests.random_models import Build

BLOCK, TOKENS = 4, 22


def ids() -> Tensor:
    return torch.randint(64, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def everything(_: int, query: Tensor, key: Tensor) -> Blocks:
    visible = visible_blocks(query.shape[2], key.shape[2], BLOCK)
    return blocks_of(visible[None, None].expand(len(query), 1, -1, -1), BLOCK, key.shape[2])


def own_block(_: int, query: Tensor, key: Tensor) -> Blocks:
    visible = visible_blocks(query.shape[2], key.shape[2], BLOCK)
    return blocks_of(torch.zeros_like(visible)[None, None], BLOCK, key.shape[2])


@torch.no_grad()
def hidden(model: PreTrainedModel, cuts: list[int], **attention: object) -> Tensor:
    """Return the hidden states of all tokens, run in pieces that end at ``cuts``."""
    cache, start, parts = DynamicCache(), 0, []
    with passing(model, **attention):
        for stop in [*cuts, TOKENS]:
            parts.append(continue_from(model, ids()[:, start:stop], cache, start))
            start = stop
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("cuts", [[], [9], [8, 9, 10, 11, 12, 13]], ids=["prefill", "continuation", "decoding"])
def test_all_blocks_are_dense_attention(random_model: Build, cuts: list[int]) -> None:
    model = random_model()
    torch.testing.assert_close(hidden(model, cuts, selector=everything), hidden(model, []), rtol=1e-5, atol=1e-5)


def test_the_own_block_alone_is_what_the_block_would_be_by_itself(random_model: Build) -> None:
    model = random_model(max_position_embeddings=64)
    found = hidden(model, [10], selector=own_block)
    with torch.no_grad():
        alone = continue_from(model, ids()[:, 4:8], DynamicCache(), 4)
    torch.testing.assert_close(found[:, 4:8], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[:, 8:], hidden(model, [])[:, 8:], atol=1e-3)


def test_a_layer_without_blocks_is_dense(random_model: Build) -> None:
    model = random_model()
    torch.testing.assert_close(hidden(model, [9], selector=lambda *_: None), hidden(model, [9]))


def test_passing_reaches_every_forward_inside_and_none_after(random_model: Build) -> None:
    model = random_model()
    layers: list[int] = []
    hidden(model, [9], observer=lambda layer, *_: layers.append(layer))
    assert layers == [0, 1, 0, 1]
    hidden(model, [])
    assert len(layers) == 4


def test_a_forwards_own_keyword_wins(random_model: Build) -> None:
    model, own, passed = random_model(), list[int](), list[int]()
    with passing(model, observer=lambda layer, *_: passed.append(layer)), torch.no_grad():
        continue_from(model, ids(), DynamicCache(), 0, observer=lambda layer, *_: own.append(layer))
    assert (own, passed) == ([0, 1], [])


def test_padded_rows_are_refused(random_model: Build) -> None:
    model = random_model()
    padded = torch.tensor([[True, False]])
    with torch.no_grad(), pytest.raises(ValueError, match=r"batches of one row \(data\.batch_size=1\)"):
        continue_from(model, ids()[:, :2], DynamicCache(), 0, selector=everything, newest_visible=padded)
