"""Checks that objective, eviction and press fit one another, made before a model is loaded."""

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import Objective
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.training.press_distances import PressDistances


def fit_together(objective: Objective, eviction: Eviction) -> None:
    """Raise ``ValueError`` if ``eviction`` cannot answer what ``objective`` requests."""
    request = objective.request
    needs = {
        "the selection objective trains a press's scores": request.scores,
        "the chunks objective supervises what follows an eviction of earlier chunks": request.chunks,
        "the first_chunk objective supervises what is read before a press evicts": request.first_chunk,
        "the full_cache objective supervises what the press's model does without an eviction": request.full_cache,
        "the reconstruction objective asks for what a press evicted": request.contexts,
        "the sparse_lm objective adds what a press measures": request.press_losses,
    }
    for what, needed in needs.items():
        if needed and not isinstance(eviction, RealEviction):
            raise ValueError(
                f"{what}, and {type(eviction).__name__} has no press: use RealEviction, or another objective"
            )
    if not isinstance(eviction, RealEviction):
        return
    traits = traits_of(eviction.press)
    if not request.scores and PressDistances(eviction.press).drawing:
        raise ValueError(
            "EvictionAugPress.by_distance follows how much of the teacher's attention each press keeps, which only the "
            "selection objective measures: add it to the objective, or leave by_distance out"
        )
    if request.press_losses and not traits.adds_losses:
        raise ValueError(
            f"the sparse_lm objective adds what SparseRegPress measures, and {traits.name} measures "
            "nothing: put SparseRegPress around it, or take the LM objective"
        )
    if request.scores and not traits.trainable:
        raise ValueError(
            f"the selection objective has nothing to train in {traits.name}: its scores do not depend "
            "on the model. Add a press that scores with queries, keys or hidden states, or leave the objective out"
        )
    silent = [candidate for candidate in traits.candidates if not candidate.by_scores]
    if request.contexts and silent:
        raise ValueError(
            f"the reconstruction objective asks for what a press evicted, and {silent[0].name} does not report "
            "which pairs those are: take one that selects by scores (SnapKVPress, say), or leave the objective out"
        )


def check_evicts_in_evaluation(eviction: Eviction) -> None:
    """Raise ``ValueError`` if ``eviction`` may select with a press that only evicts in training.

    Validation would run with the full cache, or be a mean over batches with and without an eviction.
    """
    candidates = () if eviction.press is None else traits_of(eviction.press).candidates
    if silent := [candidate.name for candidate in candidates if candidate.only_trains]:
        raise ValueError(
            f"validation_eviction is null, or evicts with {silent[0]} itself, which evicts in training alone: "
            "validation would see the full cache where that selects. Name another eviction (RealEviction with "
            "SnapKVPress, say)"
        )
