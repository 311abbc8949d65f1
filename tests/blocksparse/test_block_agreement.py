"""Agreement measures compared with sets and sorted lists; the observer of a dense pass finds planted attention."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.attention.blocks import TopBlocks, top_blocks, visible_blocks
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
from sparsekv_pl.blocksparse.block_agreement import AgreementSettings, BlockAgreement
from sparsekv_pl.blocksparse.block_methods import ORACLE, SHARED_ORACLE, BlockMethod
from sparsekv_pl.blocksparse.control_blocks import LocalBlocks, RandomBlocks
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk
from sparsekv_pl.blocksparse.true_blocks import TrueBlocks
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.storage.records import Record
from tests.random_models import Build

SIZE, HEADS, BLOCKS = 4, 4, 12
KEYS = SIZE * BLOCKS
SETTINGS = AgreementSettings(SIZE, top_k=4, budgets=(2, 4, 12), shares=(0.9,), pictured=(1,))


def methods() -> list[BlockMethod]:
    return [
        BlockMethod("walk", lambda: SketchWalk(SIZE, 8, dense_layers=1)),
        BlockMethod("true", lambda: TrueBlocks(SIZE)),
        BlockMethod("above", lambda: TrueBlocks(SIZE), threshold=0.2),
        BlockMethod("random", lambda: RandomBlocks(SIZE)),
        BlockMethod("local", lambda: LocalBlocks(SIZE)),
    ]


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Every head sends the last half of its queries to block 2, and otherwise attends as chance has it."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(1, HEADS, KEYS, 16, generator=generator), torch.randn(1, 2, KEYS, 16, generator=generator)
    wanted = torch.randn(16, generator=generator)
    query[:, :, KEYS // 2 :] += 2 * wanted
    key[:, :, 2 * SIZE : 3 * SIZE] += 2 * wanted
    return query, key, key


def observed(layers: int = 2) -> BlockAgreement:
    seen = BlockAgreement(methods(), SETTINGS)
    for layer in range(layers):
        seen(layer, *states(layer))
    return seen


def by_method(records: list[Record], layer: int) -> dict[str, Record]:
    return {record["method"]: record for record in records if record["layer"] == layer}


def test_the_truth_agrees_with_the_oracle_in_everything() -> None:
    found = by_method(observed().agreement, 1)
    for name in ("true", ORACLE):
        for measure in ("overlap", "jaccard", "recall", "pearson", "spearman"):
            assert found[name][measure] == pytest.approx(1)
            assert found[name][f"{measure}_free"] == pytest.approx(1)
    assert {k: v for k, v in found["true"].items() if k != "method"} == {
        k: v for k, v in found[ORACLE].items() if k != "method"
    }


def test_a_dense_layer_has_no_record() -> None:
    seen = observed()
    assert "walk" not in by_method(seen.agreement, 0)
    assert "walk" in by_method(seen.agreement, 1)
    assert not any(pair["layer"] == 0 and "walk" in (pair["method"], pair["other"]) for pair in seen.pairs)


def test_the_walk_finds_the_planted_block_and_chance_does_not() -> None:
    found = by_method(observed().agreement, 1)
    assert found[ORACLE]["mass_kept"] >= found[SHARED_ORACLE]["mass_kept"] >= found["walk"]["mass_kept"]
    assert found["walk"]["mass_kept"] > found["random"]["mass_kept"] + 0.1
    assert found["walk"]["pearson_free"] > 0.5 > abs(found["random"]["pearson_free"]) + 0.2


def test_random_blocks_overlap_by_chance_once_the_forced_ones_are_left_out() -> None:
    """Row r sees r + 1 blocks, r - 1 of them free; 2 of these are chosen by each."""
    runs = [by_method(_one_layer(seed), 0)["random"] for seed in range(40)]
    expected = sum(2 / (row - 1) for row in range(4, BLOCKS)) / (BLOCKS - 4)
    assert sum(run["overlap_free"] for run in runs) / len(runs) == pytest.approx(expected, abs=0.03)
    assert all(run["overlap"] == pytest.approx((2 + 2 * run["overlap_free"]) / 4) for run in runs)


def _one_layer(seed: int) -> list[Record]:
    seen = BlockAgreement([BlockMethod("random", lambda: RandomBlocks(SIZE, seed))], SETTINGS)
    seen(0, *states(seed))
    return seen.agreement


def test_budgets_and_shares_are_those_of_the_selection() -> None:
    found = by_method(observed().agreement, 0)
    for record in (found["local"], found[ORACLE], found["random"]):
        assert record["mass_at_4"] == pytest.approx(record["mass_kept"])
        assert record["sparsity_at_4"] == pytest.approx(record["choice_sparsity"])
        assert record["mass_at_12"] == pytest.approx(1)
        assert record["mass_at_2"] <= record["mass_at_4"]
    assert found[ORACLE]["recall_at_4"] == 1
    assert found[ORACLE]["sparsity_for_0.9"] >= found["local"]["sparsity_for_0.9"]
    assert "mass_at_4" not in found["above"]


def test_sparsity_is_that_of_all_query_blocks() -> None:
    query, key, _ = states()
    blocks = TopBlocks(LocalBlocks(SIZE), 4)(0, query, key)
    assert blocks is not None
    assert by_method(observed().agreement, 0)["local"]["sparsity"] == pytest.approx(float(blocks.sparsity()))


def test_pairs_are_told_once_and_both_ways() -> None:
    pairs = [pair for pair in observed().pairs if pair["layer"] == 1]
    assert len(pairs) == 5 * 4 / 2
    above = next(pair for pair in pairs if (pair["method"], pair["other"]) == ("true", "above"))
    assert above["overlap"] < 1 == above["overlap_back"]  # four blocks, or those of them above a threshold
    assert above["jaccard"] == pytest.approx(above["overlap"])


def test_a_picture_holds_means_over_heads() -> None:
    (picture,) = observed().pictures
    assert picture["layer"] == 1
    truth, local = (torch.tensor(values) for values in (picture["truth"], picture["chosen"]["local"]))
    assert truth.shape == (BLOCKS, BLOCKS)
    torch.testing.assert_close(truth.sum(-1), torch.ones(BLOCKS), rtol=0, atol=0.01)
    assert local[-1].tolist() == [1.0] + [0.0] * 8 + [1.0] * 3


@torch.no_grad()
def test_observing_a_model_changes_nothing(random_model: Build) -> None:
    model, ids = random_model(), torch.randint(0, 64, (1, KEYS), generator=torch.Generator().manual_seed(0))
    seen = BlockAgreement(methods(), SETTINGS)
    observed_pass = continue_from(model, ids, DynamicCache(), 0, observer=seen)
    torch.testing.assert_close(observed_pass, continue_from(model, ids, DynamicCache(), 0), rtol=0, atol=0)
    assert {record["layer"] for record in seen.agreement} == {0, 1}


ROWS, COUNT, SCORED = 5, 9, 3
VISIBLE = visible_blocks(ROWS, COUNT, 1)


def choice(seed: int, heads: int = SCORED) -> Tensor:
    drawn = torch.rand(2, heads, ROWS, COUNT, generator=torch.Generator().manual_seed(seed)) < 0.4
    return drawn & VISIBLE


def mass(seed: int) -> Tensor:
    drawn = torch.rand(2, SCORED, ROWS, COUNT, generator=torch.Generator().manual_seed(seed)).pow(4)
    drawn = drawn * VISIBLE
    return drawn / drawn.sum(-1, keepdim=True)


def test_free_blocks_leave_out_the_first_and_the_own() -> None:
    free = free_blocks(visible_blocks(4, 4, 1))
    assert [row.nonzero().flatten().tolist() for row in free] == [[], [], [1], [1, 2]]
    later = free_blocks(visible_blocks(2, 5, 1))
    assert [row.nonzero().flatten().tolist() for row in later] == [[1, 2], [1, 2, 3]]


@pytest.mark.parametrize("heads", [1, SCORED])
@pytest.mark.parametrize("free", [False, True])
def test_overlap_and_jaccard_are_those_of_sets(heads: int, free: bool) -> None:
    among = free_blocks(VISIBLE) if free else VISIBLE
    one, other = choice(0, heads), choice(1)
    overlaps, similarities = overlap(one, other, among), jaccard(one, other, among)
    undefined = 0
    for index in np.ndindex(2, SCORED, ROWS):
        row = index[2]
        allowed = set(among[row].nonzero().flatten().tolist())
        a = set(one.expand(2, SCORED, ROWS, COUNT)[index].nonzero().flatten().tolist()) & allowed
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
    scores, truth = torch.randn(2, SCORED, ROWS, COUNT, generator=torch.Generator().manual_seed(0)), mass(1)
    if ties:
        scores = scores.round()
    linear, ranked = pearson(scores, truth, VISIBLE), spearman(scores, truth, VISIBLE)
    for index in np.ndindex(2, SCORED, ROWS):
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
@pytest.mark.parametrize("heads", [1, SCORED])
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
