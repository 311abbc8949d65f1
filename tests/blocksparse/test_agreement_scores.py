"""Agreement measures compared with sets and sorted lists, row by row."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import top_blocks, visible_blocks
from sparsekv_pl.blocksparse.agreement_scores import (
    blocks_for_mass,
    free_blocks,
    jaccard,
    mass_kept,
    overlap,
    pearson,
    sparsity,
    spearman,
)

ROWS, COUNT, HEADS = 5, 9, 3
VISIBLE = visible_blocks(ROWS, COUNT, 1)


def choice(seed: int, heads: int = HEADS) -> Tensor:
    drawn = torch.rand(2, heads, ROWS, COUNT, generator=torch.Generator().manual_seed(seed)) < 0.4
    return drawn & VISIBLE


def mass(seed: int) -> Tensor:
    drawn = torch.rand(2, HEADS, ROWS, COUNT, generator=torch.Generator().manual_seed(seed)).pow(4)
    drawn = drawn * VISIBLE
    return drawn / drawn.sum(-1, keepdim=True)


def test_free_blocks_leave_out_the_first_and_the_own() -> None:
    free = free_blocks(visible_blocks(4, 4, 1))
    assert [row.nonzero().flatten().tolist() for row in free] == [[], [], [1], [1, 2]]
    later = free_blocks(visible_blocks(2, 5, 1))
    assert [row.nonzero().flatten().tolist() for row in later] == [[1, 2], [1, 2, 3]]


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("free", [False, True])
def test_overlap_and_jaccard_are_those_of_sets(heads: int, free: bool) -> None:
    among = free_blocks(VISIBLE) if free else VISIBLE
    one, other = choice(0, heads), choice(1)
    overlaps, similarities = overlap(one, other, among), jaccard(one, other, among)
    undefined = 0
    for index in np.ndindex(2, HEADS, ROWS):
        row = index[2]
        allowed = set(among[row].nonzero().flatten().tolist())
        a = set(one.expand(2, HEADS, ROWS, COUNT)[index].nonzero().flatten().tolist()) & allowed
        b = set(other[index].nonzero().flatten().tolist()) & allowed
        assert float(overlaps[index]) == pytest.approx(len(a & b) / len(a) if a else math.nan, nan_ok=True)
        assert float(similarities[index]) == pytest.approx(len(a & b) / len(a | b) if a | b else math.nan, nan_ok=True)
        undefined += not a
    assert undefined  # rows without a choice are among them


def test_mass_kept_is_the_share_that_falls_on_the_choice() -> None:
    truth, chosen = mass(0), choice(1)
    np.testing.assert_allclose(mass_kept(chosen, 7 * truth), (truth.numpy() * chosen.numpy()).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_numpys(ties: bool) -> None:
    scores, truth = torch.randn(2, HEADS, ROWS, COUNT, generator=torch.Generator().manual_seed(0)), mass(1)
    if ties:
        scores = scores.round()
    linear, ranked = pearson(scores, truth, VISIBLE), spearman(scores, truth, VISIBLE)
    for index in np.ndindex(2, HEADS, ROWS):
        seen = VISIBLE[index[2]]
        a, b = scores[index][seen].double().numpy(), truth[index][seen].double().numpy()
        assert float(linear[index]) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
        assert float(ranked[index]) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1], abs=1e-6)


def ranks(values: np.ndarray) -> np.ndarray:
    """The mean place of each value in the sorted list, written out."""
    return np.array([np.mean([i for i, other in enumerate(sorted(values)) if other == value]) for value in values])


def test_a_monotone_score_has_rank_correlation_one_and_a_constant_has_none() -> None:
    truth = mass(2)
    assert bool((spearman(truth.exp(), truth, VISIBLE) > 1 - 1e-9).all())
    assert bool((pearson(-truth, truth, VISIBLE) < -1 + 1e-9).all())
    flat = torch.full_like(truth, 0.1)
    assert bool(pearson(flat, truth, VISIBLE).isnan().all())
    assert bool(spearman(flat, truth, VISIBLE).isnan().all())


def test_scores_at_later_blocks_change_nothing() -> None:
    scores, truth = mass(3), mass(4)
    odd = scores.masked_fill(~VISIBLE, torch.inf)
    torch.testing.assert_close(spearman(odd, truth, VISIBLE), spearman(scores, truth, VISIBLE))
    torch.testing.assert_close(pearson(odd, truth, VISIBLE), pearson(scores, truth, VISIBLE))
    needed = blocks_for_mass(scores, truth, 0.9, VISIBLE)
    assert torch.equal(blocks_for_mass(odd, truth, 0.9, VISIBLE), needed)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_blocks_for_a_share_are_the_fewest_that_a_selection_needs(share: float, heads: int) -> None:
    """Reference: the selections themselves, from 1 block up."""
    scores, truth = torch.rand(2, heads, ROWS, COUNT, generator=torch.Generator().manual_seed(5)), mass(6)
    kept = torch.stack([mass_kept(top_blocks(scores, k, 1, COUNT).mask(), truth) for k in range(2, COUNT + 1)], -1)
    expected = (kept < share - 1e-6).sum(-1) + 2
    needed = blocks_for_mass(scores, truth, share, VISIBLE)
    assert torch.equal(needed.clamp(min=2), torch.minimum(expected, VISIBLE.sum(-1)))
    assert len(set(needed.flatten().tolist())) > 2


def test_sparsity_counts_what_is_left_out_of_all_rows() -> None:
    blocks = torch.tensor([[5.0, 6.0, 7.0, 8.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(sparsity(blocks, VISIBLE), torch.tensor([0.0, 1 - 5 / 35]))


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share={share} must be in"):
        blocks_for_mass(mass(0), mass(0), share, VISIBLE)
