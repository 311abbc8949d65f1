"""Validation with the full cache and with an evicted one, from a single prefill where the press allows it."""

import torch
from torch import Tensor

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.prefill import full_cache
from sparsekv_pl.eviction.real import RealEviction, continued
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.step_draws import draw
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.training.student import Student


@torch.no_grad()
def full_and_evicted(student: Student, batch: Batch, compression_ratio: float, place: int) -> tuple[Tensor, Tensor]:
    """Return the continuations' hidden states (B, T, E) with the full cache, and under eviction.

    The contexts have equal lengths; ``place`` seeds the draws. Two prefills run if the model is sharded, because its
    layers have weights only while they run, and if the eviction does not follow from a dense prefill alone (chunks, a
    budget, KV dropout, presses that change the model's computation).
    """
    model, eviction = causal_lm(student.model), student.eviction
    context, continuation = batch["context_ids"], batch["continuation_ids"]
    if not _is_replayable(eviction, context.shape[1]) or any(hasattr(p, "full_tensor") for p in model.parameters()):
        return full_cache(model, context, continuation), student.evict(batch, compression_ratio, place).hidden
    assert isinstance(eviction, RealEviction)
    draw(eviction.press, place)
    set_compression_ratio(eviction.press, compression_ratio)
    recorded, deciding = RecordedPrefill(model, context), traits_of(eviction.press).deciding.press
    full, evicted = (continued(model, recorded.evicted(press), continuation) for press in (None, deciding))
    return full, evicted


def _is_replayable(eviction: Eviction, tokens: int) -> bool:
    """Return whether the pairs that ``eviction`` keeps of ``tokens`` tokens follow from a dense prefill alone."""
    return (
        isinstance(eviction, RealEviction)
        and (eviction.chunk_tokens is None or eviction.chunk_tokens >= tokens)
        and eviction.budget is None
        and all(candidate.same_at_every_ratio for candidate in traits_of(eviction.press).candidates)
    )
