"""Real eviction in training: the context runs through the model in chunks and a press shrinks the cache after each.

``ChunkedPrefill`` does it, with and without gradients, for training and evaluation, so the two cannot drift apart.
"""

from dataclasses import dataclass

import torch
from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.checkpointed_prefill import checkpointed_prefill
from sparsekv_pl.eviction.interface import Evicted, EvictedContext
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.limits import check_chunks, check_continuation
from sparsekv_pl.eviction.prefill import ChunkedPrefill, chunk_bounds, continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.step_draws import draw
from sparsekv_pl.presses.traits import traits_of


@dataclass
class RealEviction:
    """Evict for real with any kvpress press.

    Parameters
    ----------
    press
        Selects what stays.
    chunk_tokens
        Most tokens per chunk; null runs the context in one. Chunks are cut as equal as they can be.
    budget
        KV pairs per head that the cache may keep, in tokens. Where it is smaller than what the compression ratio would
        keep, it decides; with it memory stays flat however long the context is.
    checkpoint
        Keep no activations of the context: backward runs each chunk again, so that only one chunk's live at a time. For
        long contexts; costs a second forward. See eviction/checkpointed_prefill.py.
    """

    press: BasePress
    chunk_tokens: int | None = None
    budget: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token, or null")

    def check(self, context_tokens: int, request: Request = NOTHING) -> None:
        """Raise ``ValueError`` if a chunk would be too short for the press, or the press cannot be run in chunks."""
        check_chunks(traits_of(self.press), chunk_bounds(context_tokens, self.chunk_tokens), request)

    def __call__(
        self,
        model: PreTrainedModel,
        context_ids: Tensor,
        continuation_ids: Tensor,
        *,
        compression_ratio: float,
        step: int,
        request: Request = NOTHING,
    ) -> Evicted:
        """Run context and continuation with an eviction between the two. See ``Eviction``."""
        draw(self.press, step)
        set_compression_ratio(self.press, compression_ratio)
        filling = ChunkedPrefill(model, self.press, context_ids.shape[1], self.chunk_tokens, self.budget, request)
        prefilled = checkpointed_prefill(filling, context_ids) if self.checkpoint else filling.run(context_ids)
        kept = kept_memory(model, prefilled.cache).kept_pairs * prefilled.mean_weight
        context = evicted_context(model, prefilled, context_ids) if request.contexts else None
        hidden = continued(model, prefilled, continuation_ids)
        losses = {} if prefilled.press_context is None else prefilled.press_context.losses
        means = {name: stacked(terms).mean() for name, terms in losses.items()}
        return Evicted(hidden, kept / context_ids.shape[1], prefilled.selections, means, context)


def continued(model: PreTrainedModel, prefilled: Prefilled, ids: Tensor) -> Tensor:
    """Hidden states (B, T, E) of a continuation (B, T), which joins the cache; ``ValueError`` where it ends too far."""
    check_continuation(model, prefilled.next_position, ids.shape[1])
    weights = None if prefilled.press_context is None else prefilled.press_context.key_log_weights
    return continue_from(model, ids, prefilled.cache, prefilled.next_position, key_log_weights=weights)


def evicted_context(model: PreTrainedModel, prefilled: Prefilled, context_ids: Tensor) -> EvictedContext:
    """What can be asked of a context (B, L) after its eviction."""
    if not prefilled.positions:
        raise ValueError(
            "this press does not say which pairs it keeps, so no objective can ask for those that it evicted: use a "
            "press that selects by scores, or an objective without reconstruction"
        )
    kept = torch.zeros(context_ids.shape, device=context_ids.device)
    weights = {} if prefilled.press_context is None else prefilled.press_context.key_log_weights
    for layer, positions in prefilled.positions.items():
        weight = weights[layer].detach().exp() if layer in weights else torch.ones_like(positions, dtype=torch.float32)
        share = (weight / positions.shape[1]).flatten(1)
        kept.scatter_add_(1, positions.flatten(1).to(kept.device), share.to(kept.device))
    lost = 1 - kept / len(prefilled.positions)
    before = prefilled.branch()
    return EvictedContext(context_ids, lost, lambda ids: continued(model, before.branch(), ids))
