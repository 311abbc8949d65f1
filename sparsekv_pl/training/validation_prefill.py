"""Validation's two sides, the full cache and an evicted one, from one prefill where the press only looks on."""

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
    """Hidden states (B, T, E) of the continuations of equally long contexts, with the full cache and under eviction.

    A sharded model, whose layers have their weights only while they run, and evictions that need more than one look at
    a dense prefill (chunks, a budget, KV dropout, presses that write) take a prefill for each.
    """
    model, eviction = causal_lm(student.model), student.eviction
    context, continuation = batch["context_ids"], batch["continuation_ids"]
    if not _looks_on(eviction, context.shape[1]) or any(hasattr(p, "full_tensor") for p in model.parameters()):
        return full_cache(model, context, continuation), student.evict(batch, compression_ratio, place).hidden
    assert isinstance(eviction, RealEviction)
    draw(eviction.press, place)
    set_compression_ratio(eviction.press, compression_ratio)
    recorded, deciding = RecordedPrefill(model, context), traits_of(eviction.press).deciding.press
    full, evicted = (continued(model, recorded.evicted(press), continuation) for press in (None, deciding))
    return full, evicted


def _looks_on(eviction: Eviction, tokens: int) -> bool:
    """Whether what ``eviction`` keeps of ``tokens`` tokens depends on a dense prefill alone."""
    return (
        isinstance(eviction, RealEviction)
        and (eviction.chunk_tokens is None or eviction.chunk_tokens >= tokens)
        and eviction.budget is None
        and all(candidate.same_at_every_ratio for candidate in traits_of(eviction.press).candidates)
    )
