"""Which objectives, evictions and presses go together: checked before a model is loaded."""

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.chunked import ChunkedEviction
from sparsekv_pl.objectives import Objective
from sparsekv_pl.presses.traits import traits_of


def fit_together(objective: Objective, eviction: Eviction) -> None:
    """Let the eviction keep what the objective needs, or raise ``ValueError`` saying why it cannot."""
    needs = {
        "the selection objective trains a press's scores": objective.needs_selections,
        "the reconstruction objective asks for what a press evicted": objective.needs_contexts,
        "the sparse_lm objective adds what a press measures": objective.needs_press_losses,
    }
    for what, needed in needs.items():
        if needed and not isinstance(eviction, ChunkedEviction):
            raise ValueError(
                f"{what}, and {type(eviction).__name__} has no press: use ChunkedEviction, or another objective"
            )
    if not isinstance(eviction, ChunkedEviction):
        return
    traits = traits_of(eviction.press)
    if objective.needs_press_losses and not traits.adds_losses:
        raise ValueError(
            f"the sparse_lm objective adds what SparseRegPress measures, and {traits.name} measures "
            "nothing: put SparseRegPress around it, or take the LM objective"
        )
    if objective.needs_selections and not traits.trainable:
        raise ValueError(
            f"the selection objective has nothing to train in {traits.name}: its scores do not depend "
            "on the model. Add a press that scores with queries, keys or hidden states, or leave the objective out"
        )
    silent = [candidate for candidate in traits.candidates if not candidate.by_scores]
    if objective.needs_contexts and silent:
        raise ValueError(
            f"the reconstruction objective asks for what a press evicted, and {silent[0].name} does not say "
            "which pairs those are: take one that selects by scores (SnapKVPress, say), or leave the objective out"
        )
    eviction.catch_scores = objective.needs_selections
    eviction.keep_context = objective.needs_contexts


def check_evicts_in_evaluation(eviction: Eviction) -> None:
    """Raise ``ValueError`` where validation under ``eviction`` would silently be validation with the full cache."""
    press = getattr(eviction, "press", None)
    traits = None if press is None else traits_of(press)
    if traits is not None and traits.only_trains:
        raise ValueError(
            f"{traits.name} evicts in training alone, so validation would see the full cache: name what "
            "validation evicts with in validation_eviction (ChunkedEviction with SnapKVPress, say)"
        )
