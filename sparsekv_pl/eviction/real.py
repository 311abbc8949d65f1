"""Real eviction in training: the context runs through the model in chunks, and a press shrinks the cache after each.

Training (with gradients) and evaluation (without) both use ``ChunkedPrefill``, so the two cannot drift apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.checkpointed_prefill import checkpointed_prefill
from sparsekv_pl.eviction.chunking import chunk_bounds
from sparsekv_pl.eviction.continuation import Continuation, continued
from sparsekv_pl.eviction.interface import Evicted, EvictedContext
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.limits import check_chunks
from sparsekv_pl.eviction.local_gradients import LocalGradients
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.presses.ratio import check_takes_a_ratio, set_compression_ratio
from sparsekv_pl.presses.step_draws import draw
from sparsekv_pl.presses.traits import traits_of


@dataclass
class RealEviction:
    """Evict for real with any kvpress press.

    Parameters
    ----------
    press
        Selects the KV pairs that stay.
    chunk_tokens
        Most tokens per chunk; null runs the context in one chunk. Chunk lengths differ by at most one token.
    budget
        Most KV pairs per head that the cache keeps, in tokens; applies if the compression ratio, or ``decoding``, would
        keep more. With it, memory does not grow with the text. Null sets no limit.
    checkpoint
        Keep no activations of the context: backward runs each chunk again, so only one chunk's activations exist at a
        time. For long contexts; costs a second forward. See eviction/checkpointed_prefill.py.
    local_gradients
        Steps and contexts whose gradients stay in the layer, which saves the context's backward; null for none.
    quantisation
        Bits in which the kept pairs are stored: what follows reads them rounded, and gradients pass through the
        rounding unchanged. Null keeps them whole.
    decoding
        Evict while the continuation is read too, so that each of its tokens is predicted from the cache that would
        stand at that moment; null evicts between context and continuation alone.

    Raises
    ------
    ValueError
        If ``chunk_tokens`` or ``budget`` is below 1.
    """

    press: BasePress
    chunk_tokens: int | None = None
    budget: int | None = None
    checkpoint: bool = False
    local_gradients: LocalGradients | None = None
    quantisation: PairQuantisation | None = None
    decoding: Decoding | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token, or null")

    def check(self, context_tokens: int, request: Request = NOTHING) -> None:
        """Raise ``ValueError`` if a chunk would be too short for the press, or the press cannot run in chunks.

        So also if the press takes no ratio, or ``request`` cannot be met.
        """
        check_takes_a_ratio(self.press)
        bounds = chunk_bounds(context_tokens, self.chunk_tokens)
        traits = traits_of(self.press)
        check_chunks(traits, bounds, request)
        if self.decoding is not None:
            self.decoding.check(traits, request, training=True)
        if request.chunks and len(bounds) < 2:
            raise ValueError(
                f"the chunks objective supervises chunks after the first, and a context of {context_tokens} tokens is "
                f"one chunk (chunk_tokens={self.chunk_tokens}): lower chunk_tokens, or leave the objective out"
            )
        if request.full_cache and (len(bounds) > 1 or self.checkpoint):
            raise ValueError(
                "the full_cache objective continues the cache as it was before the eviction, which a context has in "
                f"one chunk without checkpoint; here chunk_tokens is {self.chunk_tokens} of {context_tokens} tokens "
                f"and checkpoint {str(self.checkpoint).lower()}: change these, or leave the objective out"
            )

    def later_evictions(
        self, context_tokens: int, continuation_tokens: int, turn_ends: Sequence[int] = ()
    ) -> Sequence[int]:
        """Return after how many tokens it evicts again while a continuation is read: see ``Decoding.evictions``."""
        decoding = self.decoding
        return () if decoding is None else decoding.evictions(context_tokens, continuation_tokens, turn_ends)

    def __call__(
        self,
        model: PreTrainedModel,
        context_ids: Tensor,
        continuation_ids: Tensor,
        *,
        compression_ratio: float,
        step: int,
        request: Request = NOTHING,
        turn_ends: Sequence[int] = (),
    ) -> Evicted:
        """Run context and continuation with an eviction between the two. See ``Eviction``."""
        draw(self.press, step)
        decoding, tokens = self.decoding, context_ids.shape[1]
        set_compression_ratio(self.press, compression_ratio if decoding is None or decoding.context else 0.0)
        local = self.local_gradients is not None and self.local_gradients.at(step, tokens)
        follow = request if decoding is None else request | Request(contexts=True)
        settings = (self.chunk_tokens, self.budget, follow, local)
        filling = QuantisedPrefill(model, self.press, tokens, *settings, quantisation=self.quantisation)
        prefilled = checkpointed_prefill(filling, context_ids) if self.checkpoint else filling.run(context_ids)
        kept = kept_memory(model, prefilled.cache).kept_pairs * prefilled.mean_weight
        context = evicted_context(model, prefilled, context_ids) if request.contexts else None
        full = None if prefilled.uncut is None else continue_from(model, continuation_ids, prefilled.uncut, tokens)
        evicted, later_chunks = [prefilled], prefilled.hidden[int(request.first_chunk) :]
        later = self.later_evictions(tokens, continuation_ids.shape[1], turn_ends)
        if decoding is not None and later:
            reading = Continuation(filling, decoding, compression_ratio, later[-1] - tokens, turn_ends)
            hidden, last = reading.train(continuation_ids, self.checkpoint)
            evicted.append(last)
        else:
            hidden = continued(model, prefilled, continuation_ids)
        return Evicted(
            hidden,
            kept / tokens,
            [selection for part in evicted for selection in part.selections],
            _mean_losses(evicted),
            context,
            torch.cat(later_chunks, dim=1) if later_chunks else None,
            prefilled.hidden[0] if request.first_chunk else None,
            full,
        )


def _mean_losses(evicted: Sequence[Prefilled]) -> dict[str, Tensor]:
    """Return each press loss's mean over layers, chunks and evictions while the continuation is read."""
    losses = dict[str, list[Tensor]]()
    for part in evicted:
        for name, terms in ({} if part.press_context is None else part.press_context.losses).items():
            losses.setdefault(name, []).extend(terms)
    return {name: stacked(terms).mean() for name, terms in losses.items()}


def evicted_context(model: PreTrainedModel, prefilled: Prefilled, context_ids: Tensor) -> EvictedContext:
    """Return the context (B, L) after its eviction, for objectives that continue it.

    Raises ``ValueError`` if the positions of the kept pairs are unknown.
    """
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
