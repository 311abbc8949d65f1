"""The presses that fit an objective which needs evicted contexts."""

import pytest
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkKVPress,
    KeyRerotationPress,
    KnormPress,
    MergingPress,
    RandomPress,
    SnapKVPress,
    ThinKPress,
)

from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import Reconstruction, SelectionObjective
from sparsekv_pl.presses import (
    AdaptiveBlockDropoutPress,
    AnchorPress,
    BlockDropoutPress,
    EvictionAugPress,
    SentenceDropoutPress,
    SparseRegPress,
    VariableBlockPress,
)
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.training.compatibility import check_evicts_in_evaluation, fit_together


@pytest.mark.parametrize(
    "press",
    [
        KnormPress(),
        KeyRerotationPress(KnormPress()),
        MergingPress(KnormPress()),
        EvictionAugPress([KnormPress(), SparseRegPress(press=SnapKVPress())]),
    ],
)
def test_presses_that_select_by_scores_can_be_asked_for_what_they_evicted(press: BasePress) -> None:
    fit_together(Reconstruction(), RealEviction(press))
    assert all(candidate.by_scores for candidate in traits_of(press).candidates)


@pytest.mark.parametrize(
    "press, named",
    [
        (ThinKPress(), "ThinK"),
        (EvictionAugPress([KnormPress(), AdaKVPress(KnormPress())]), "AdaKV"),
        (EvictionAugPress([KnormPress(), ChunkKVPress(KnormPress())], weights=[1, 0]), "ChunkKV"),
        (SparseRegPress(press=AdaKVPress(KnormPress())), "AdaKV"),
    ],
)
def test_one_candidate_that_does_not_say_what_it_kept_is_refused_before_training(press: BasePress, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.* does not report which pairs"):
        fit_together(Reconstruction(), RealEviction(press))


@pytest.mark.parametrize(
    "press",
    [
        RandomPress(),
        BlockDropoutPress(),
        AdaptiveBlockDropoutPress(),
        VariableBlockPress(),
        SentenceDropoutPress(),
        AnchorPress(press=RandomPress()),
    ],
)
def test_a_selection_loss_needs_scores_to_align(press: BasePress) -> None:
    with pytest.raises(ValueError, match="has nothing to train in"):
        fit_together(SelectionObjective(), RealEviction(press))
    fit_together(SelectionObjective(), RealEviction(EvictionAugPress([press, AnchorPress()])))


@pytest.mark.parametrize(
    "press",
    [
        BlockDropoutPress(),
        EvictionAugPress([BlockDropoutPress(), KnormPress()]),
        EvictionAugPress([KnormPress(), AdaKVPress(BlockDropoutPress())]),
        SparseRegPress(press=EvictionAugPress([KnormPress(), SparseRegPress()])),
    ],
)
def test_no_batch_of_a_validation_keeps_the_full_cache_under_a_presss_name(press: BasePress) -> None:
    with pytest.raises(ValueError, match=r"validation_eviction .* evicts in training alone: .* Name another eviction"):
        check_evicts_in_evaluation(RealEviction(press))
    check_evicts_in_evaluation(RealEviction(EvictionAugPress([KnormPress(), SnapKVPress()])))
