"""The blocks that can be selected, those that always are, and the selection of the rest by scores."""

import pytest
import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import (
    NOTHING,
    Blocks,
    TopBlocks,
    block_count,
    blocks_of,
    first_block,
    threshold_blocks,
    top_blocks,
    visible_blocks,
)

SIZE = 4


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def rows(blocks: Blocks, row: int = 0, group: int = 0) -> list[list[int]]:
    return [[block for block in chosen if block != NOTHING] for chosen in blocks.indices[row, group].tolist()]


class Scores:
    """A scorer with fixed scores."""

    def __init__(self, scores: Tensor | None) -> None:
        self.scores, self.block_size = scores, SIZE

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:  # noqa: ARG002
        return self.scores


def states(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 2, queries, 8), torch.zeros(1, 1, keys, 8)


@pytest.mark.parametrize(
    ("queries", "keys", "first", "count"), [(16, 16, 0, 4), (14, 14, 0, 4), (1, 14, 3, 4), (5, 14, 2, 4), (1, 17, 4, 5)]
)
def test_query_blocks_are_those_that_the_last_positions_touch(queries: int, keys: int, first: int, count: int) -> None:
    touched = sorted({position // SIZE for position in range(keys - queries, keys)})
    assert touched == list(range(first, count))
    assert (first_block(queries, keys, SIZE), block_count(keys, SIZE)) == (first, count)
    visible = [[block <= row for block in range(count)] for row in touched]
    assert visible_blocks(queries, keys, SIZE).tolist() == visible
    assert top_blocks(random_scores(1, 1, len(touched), count), 2, SIZE, keys).first == first


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 20])
def test_top_blocks_are_own_and_first_and_then_the_best_that_are_visible(top_k: int) -> None:
    scores = random_scores(2, 3, 5, 8)
    blocks = top_blocks(scores, top_k, SIZE, keys=31)
    for row, group, index in torch.cartesian_prod(*map(torch.arange, (2, 3, 5))).tolist():
        own, wanted = blocks.first + index, scores[row, group, index]
        order = [own, 0, *sorted(range(1, own), key=lambda block: -float(wanted[block]))]
        assert rows(blocks, row, group)[index] == sorted(order[:top_k])


def test_rows_of_a_batch_and_groups_are_chosen_by_themselves() -> None:
    scores = random_scores(2, 2, 6, 6)
    together = top_blocks(scores, 3, SIZE, keys=24)
    for row, group in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        alone = top_blocks(scores[row : row + 1, group : group + 1], 3, SIZE, keys=24)
        assert rows(together, row, group) == rows(alone)


@pytest.mark.parametrize("extreme", [torch.inf, torch.finfo(torch.float32).max, torch.nan])
def test_no_score_displaces_own_or_first(extreme: float) -> None:
    blocks = top_blocks(torch.full((1, 1, 8, 8), extreme), 2, SIZE, keys=32)
    assert rows(blocks) == [[0], *([0, own] for own in range(1, 8))]


def test_what_is_scored_minus_infinity_is_not_chosen() -> None:
    scores = torch.full((1, 1, 4, 4), -torch.inf)
    scores[..., 2] = 1.0
    assert rows(top_blocks(scores, 4, SIZE, keys=16)) == [[0], [0, 1], [0, 2], [0, 2, 3]]


def test_a_mask_gets_its_own_blocks_and_loses_later_ones() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)[None, None]
    blocks = blocks_of(mask, SIZE, keys=10)
    assert rows(blocks) == [[0], [1], [1, 2]]
    assert blocks.mask()[0, 0].long().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_mask_and_blocks_are_two_ways_to_say_the_same() -> None:
    for seed in range(5):
        mask = random_scores(2, 3, 4, 7, seed=seed) < 0.4
        blocks = blocks_of(mask, SIZE, keys=27)
        assert torch.equal(blocks_of(blocks.mask(), SIZE, keys=27).indices, blocks.indices)
        own = torch.arange(3, 7)[:, None]
        expected = mask & (torch.arange(7) <= own) | (torch.arange(7) == own)
        assert torch.equal(blocks.mask(), expected)


def test_sparsity_is_the_share_of_visible_blocks_left_out() -> None:
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[:, 1] = True
    torch.testing.assert_close(blocks_of(mask, SIZE, keys=16).sparsity(), torch.tensor([[6 / 10, 0.0]]))
    last_row = blocks_of(mask[:, :, -1:], SIZE, keys=14)
    torch.testing.assert_close(last_row.sparsity(), torch.tensor([[3 / 4, 0.0]]))


def test_top_blocks_of_a_scorer() -> None:
    scores = random_scores(1, 1, 2, 4)
    chosen = TopBlocks(Scores(scores), top_k_blocks=3)(0, *states(5, 14))
    assert chosen is not None
    assert torch.equal(chosen.indices, top_blocks(scores, 3, SIZE, keys=14).indices)
    assert (chosen.block_size, chosen.keys) == (SIZE, 14)


def test_a_threshold_chooses_first_and_own_and_all_that_reach_it() -> None:
    scores = torch.zeros(1, 1, 4, 4)
    scores[0, 0, 3] = torch.tensor([0.0, 0.1, 0.09, 0.0])
    scores[0, 0, 1, 3] = 1.0
    chosen = threshold_blocks(scores, 0.1, SIZE, keys=16)
    assert rows(chosen) == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert scores[0, 0, 0, 0] == 0


def test_a_scorer_may_leave_a_layer_dense() -> None:
    assert TopBlocks(Scores(None))(0, *states(16, 16)) is None


def test_one_block_is_too_few() -> None:
    with pytest.raises(ValueError, match="top_k_blocks=1 must be at least 2"):
        TopBlocks(Scores(None), top_k_blocks=1)
