"""Validation with the full cache and with an evicted one, from a single prefill where the press allows it."""

from typing import NamedTuple

import torch
from kvpress.utils import compute_n_kept
from torch import Tensor

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.continuation import continued
from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.prefill import full_cache
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.presses.eviction_aug import ScoringPress
from sparsekv_pl.presses.nesting import press_name, scorers_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.step_draws import draw
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.training.student import Student


class Validated(NamedTuple):
    """The two sides of a validation."""

    full: Tensor
    """(B, T, E), the continuations' hidden states with the full cache."""
    evicted: Tensor
    """(B, T, E), the same under eviction."""
    selections: list[Selection]
    """The scores of every press, also of those that were not drawn where one prefill suffices; empty unless requested
    (``Request.scores``)."""


@torch.no_grad()
def full_and_evicted(
    student: Student, batch: Batch, compression_ratio: float, place: int, request: Request = NOTHING
) -> Validated:
    """Run the continuations with the full cache, and under eviction.

    The contexts have equal lengths; ``place`` seeds the draws. Two prefills run if the model is sharded, because its
    layers have weights only while they run, and if the eviction does not follow from a dense prefill alone (chunks, a
    budget, KV dropout, presses that change the model's computation).
    """
    model, eviction = causal_lm(student.model), student.eviction
    context, continuation = batch["context_ids"], batch["continuation_ids"]
    if not _is_replayable(eviction, context.shape[1]) or any(hasattr(p, "full_tensor") for p in model.parameters()):
        full = full_cache(model, context, continuation)
        apart = student.evict(batch, compression_ratio, place, request)
        return Validated(full, apart.hidden, apart.selections)
    assert isinstance(eviction, RealEviction)
    draw(eviction.press, place)
    set_compression_ratio(eviction.press, compression_ratio)
    recorded, deciding = RecordedPrefill(model, context), traits_of(eviction.press).deciding.press
    full, evicted = (continued(model, recorded.evicted(press), continuation) for press in (None, deciding))
    return Validated(full, evicted, _selections(recorded, eviction, compression_ratio) if request.scores else [])


def _selections(recorded: RecordedPrefill, eviction: RealEviction, compression_ratio: float) -> list[Selection]:
    scoring = ScoringPress(scorers_in(eviction.press))
    recorded.evicted(scoring)
    kept = int(compute_n_kept(recorded.context_ids.shape[1], compression_ratio))
    return [Selection(one.layer, press_name(one.scorer), one.scores, kept=kept) for one in scoring.scored]


def _is_replayable(eviction: Eviction, tokens: int) -> bool:
    """Return whether the pairs that ``eviction`` keeps of ``tokens`` tokens follow from a dense prefill alone."""
    return (
        isinstance(eviction, RealEviction)
        and (eviction.chunk_tokens is None or eviction.chunk_tokens >= tokens)
        and eviction.budget is None
        and eviction.decoding is None
        and all(candidate.same_at_every_ratio for candidate in traits_of(eviction.press).candidates)
    )
