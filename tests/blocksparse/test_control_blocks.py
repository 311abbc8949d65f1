"""Control blocks do not depend on keys: they are random but repeatable, or the nearest."""

import pytest
import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import TopBlocks, visible_blocks
from sparsekv_pl.blocksparse.control_blocks import LocalBlocks, RandomBlocks

SIZE, HEADS, KEYS = 4, 3, 44
BLOCKS = 11


def states(queries: int, keys: int = KEYS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, HEADS, queries, 8, generator=generator), torch.randn(2, 1, keys, 8, generator=generator)


def test_local_blocks_are_the_first_and_the_nearest() -> None:
    blocks = TopBlocks(LocalBlocks(SIZE), 3)(0, *states(KEYS))
    assert blocks is not None
    expected = [[0, -1, -1], [0, 1, -1]] + [[0, row - 1, row] for row in range(2, BLOCKS)]
    assert blocks.indices[0, 0].tolist() == expected
    assert blocks.indices.shape[:2] == (2, 1)


def test_random_scores_do_not_depend_on_the_states_or_on_what_was_asked_before() -> None:
    scorer = RandomBlocks(SIZE, seed=3)
    first = scorer(1, *states(KEYS))
    scorer(0, *states(KEYS))
    torch.testing.assert_close(scorer(1, *states(KEYS, seed=5)), first, rtol=0, atol=0)


@pytest.mark.parametrize("queries", [1, 6, 16])
def test_random_scores_are_the_same_when_tokens_arrive_later(queries: int) -> None:
    scorer = RandomBlocks(SIZE)
    whole = scorer(2, *states(KEYS))
    later = scorer(2, *states(queries))
    torch.testing.assert_close(later, whole[:, :, -later.shape[2] :], rtol=0, atol=0)
    assert later.shape == (2, HEADS, -(-queries // SIZE), BLOCKS)


def test_layers_seeds_heads_and_rows_draw_for_themselves() -> None:
    one = RandomBlocks(SIZE)(0, *states(KEYS))
    for other in (RandomBlocks(SIZE)(1, *states(KEYS)), RandomBlocks(SIZE, seed=1)(0, *states(KEYS))):
        assert not bool((one == other)[..., visible_blocks(KEYS, KEYS, SIZE)].any())
    assert len(set(one[:, :, -1, :].flatten().tolist())) == 2 * HEADS * BLOCKS


def test_a_random_choice_takes_every_free_block_equally_often() -> None:
    """The last row of 11 blocks: 3 of the 9 free ones, so each with a chance of 1/3."""
    query, key = torch.zeros(1, 2000, SIZE, 1), torch.zeros(1, 1, KEYS, 1)
    blocks = TopBlocks(RandomBlocks(SIZE), 5)(0, query, key)
    assert blocks is not None
    chosen = blocks.mask()[0, :, -1].float().mean(0)
    assert chosen[0] == chosen[-1] == 1
    torch.testing.assert_close(chosen[1:-1], torch.full((9,), 1 / 3), rtol=0, atol=0.05)


@pytest.mark.parametrize("make", [RandomBlocks, LocalBlocks])
def test_a_block_size_below_one_is_refused(make: type) -> None:
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        make(block_size=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        RandomBlocks(seed=-1)
