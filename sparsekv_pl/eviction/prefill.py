"""Prefill with eviction: the context runs through the model in chunks, and a press shrinks the cache after each.

One chunk is "prefill, press, continue". With many, chunk n sees the cache that chunks 1..n-1 left, as on a server.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.evicted_attention import CACHED, attention_implementation
from sparsekv_pl.eviction.cache_layers import CARRIED, PAIRS, cache_of, tensors_of
from sparsekv_pl.eviction.chunking import chunk_bounds, chunk_ratio, most_positions
from sparsekv_pl.eviction.limits import (
    check_chunks,
    check_positions,
    check_reached,
    check_rope,
    check_rows,
    check_weights,
    check_window,
)
from sparsekv_pl.eviction.linear_layers import carrying
from sparsekv_pl.eviction.local_gradients import detach, layers_apart
from sparsekv_pl.eviction.other_layers import check_next_tokens, forget, move
from sparsekv_pl.eviction.position_tracker import PositionTracker
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.eviction.shifted_rotary import queries_from
from sparsekv_pl.eviction.skipped_mlp import last_mlp_for
from sparsekv_pl.eviction.uncut_cache import uncut_cache
from sparsekv_pl.eviction.uneven_layers import ratio_by_layer
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.devices import layer_device
from sparsekv_pl.models.layer_kinds import attentions, evicted_layers
from sparsekv_pl.models.rotary import inv_freq_of
from sparsekv_pl.presses.key_tokens import TOKEN_IDS
from sparsekv_pl.presses.nesting import scorers_in
from sparsekv_pl.presses.press_context import PRESS_CONTEXT, PressContext
from sparsekv_pl.presses.pressed_model import applied
from sparsekv_pl.presses.ratio import at_ratios, set_compression_ratio
from sparsekv_pl.presses.traits import traits_of


@dataclass(eq=False)
class ChunkedPrefill:
    """A prefill of ``tokens`` tokens that is advanced chunk by chunk and can be saved between two chunks.

    With many chunks, each chunk's compression ratio is set so that the press's ratio holds for all tokens seen so far
    and at most ``budget`` pairs stay.

    Parameters
    ----------
    model, press
        The causal LM and the press on it; a press of None keeps everything.
    tokens
        Length of the whole context.
    chunk_tokens
        Most tokens of a chunk; None makes one chunk. ``bounds`` has the chunks.
    budget
        Most KV pairs per head that stay after a chunk, in tokens; None sets no limit.
    request
        The results to keep (they are no part of ``state_dict``), and whether kept keys' positions are tracked also in a
        single chunk: see ``Prefilled``.
    local
        Whether gradients stay in the layer: see ``LocalGradients``.
    given
        The first chunks, (start, stop) of each; ``chunk_tokens`` cuts the rest of ``tokens``. If an earlier prefill has
        read some of them, its state must be loaded before the next one.
    decoding
        The chunks continue a context (see ``Continuation``): their hidden states are kept.

    Raises
    ------
    ValueError
        If the press cannot run in these chunks, or the context takes more positions than the model was trained on.
    """

    model: PreTrainedModel
    press: BasePress | None
    tokens: int
    chunk_tokens: int | None = None
    budget: int | None = None
    request: Request = NOTHING
    local: bool = False
    given: Sequence[tuple[int, int]] = ()
    decoding: bool = False

    def __post_init__(self) -> None:
        model, tokens, request = self.model, self.tokens, self.request
        cut = self.given[-1][1] if self.given else 0
        rest = chunk_bounds(tokens - cut, self.chunk_tokens) if tokens > cut or not cut else []
        self.bounds = [*self.given, *((cut + start, cut + stop) for start, stop in rest)]
        self.traits = None if self.press is None else traits_of(self.press)
        self.deciding = None if self.traits is None else self.traits.deciding
        self.rotates = self.deciding is not None and self.deciding.re_rotates
        self.ratio: float | None = None
        self.press_context: PressContext | None = None
        self.layers = evicted_layers(model.config)
        if self.traits is not None and self.deciding is not None:
            check_chunks(self.traits, self.bounds, request, self.decoding and not model.training)
            check_weights(model, self.traits)
            if len(self.bounds) > 1 or self.budget is not None:
                self.ratio = self.deciding.press.compression_ratio
                set_compression_ratio(self.deciding.press, self.ratio)  # raises here where there is none to set
            inv_freq = {layer: inv_freq_of(model, layer) for layer in attentions(model)} if self.rotates else None
            tracker = self.tracker = PositionTracker(self.traits, request, len(self.bounds) > 1, self.layers, inv_freq)
            self.press_context = PressContext(positions=tracker.positions, key_log_weights=tracker.log_weights)
        check_rope(model, self.bounds[0][1], tokens, self.rotates)
        positions = most_positions(self.bounds, self.rotates, self.ratio, self.budget)
        check_positions(model, positions, tokens, self.rotates)
        if self.traits is not None:
            check_window(model, positions + 1)  # a token follows
        self.cache = DynamicCache()
        self.hidden: list[Tensor] = []
        self.uncut: DynamicCache | None = None
        self.chunks_done = 0

    @property
    def seen(self) -> int:
        """Tokens prefilled so far."""
        return self.bounds[self.chunks_done][0] if self.chunks_left else self.bounds[-1][1]

    @property
    def chunks_left(self) -> int:
        """Chunks still to come."""
        return len(self.bounds) - self.chunks_done

    @property
    def next_position(self) -> int:
        """RoPE position of the next token."""
        return self._held() if self.rotates else self.seen

    def advance(self, chunk_ids: Tensor) -> None:
        """Run the next chunk (B, stop - start) and evict. After an exception the cache is invalid."""
        start, stop = self.bounds[self.chunks_done]
        if chunk_ids.shape[1] != stop - start:
            raise ValueError(
                f"chunk {self.chunks_done} of {len(self.bounds)} has tokens {start} to {stop} but {chunk_ids.shape[1]} "
                "were given: cut the context at the bounds"
            )
        if self.traits is not None:
            check_rows(self.traits, len(chunk_ids))
        held, position = self._held(), self.next_position
        keywords = self._keywords(chunk_ids)
        rotated = queries_from(self.model, position if self.traits is not None else 0)
        apart = layers_apart(self.model) if self.local else nullcontext()
        read = self.decoding or (self.request.chunks if start else self.request.first_chunk)
        computed = last_mlp_for(self.model, stop - start if read else 0)
        whole = uncut_cache(self.model, self.cache) if self.request.full_cache else nullcontext()
        with whole as self.uncut, self._evicting(held, start, stop), rotated, computed, apart:
            hidden = continue_from(self.model, chunk_ids, self.cache, position, **keywords)
        dropped = forget(self.model, self.cache, stop, () if self.traits is None else self.layers)
        if self.rotates:
            end = self._held()
            move(self.model, self.cache, end, end - (position + stop - start), dropped, self.tracker.rotation)
        self.hidden += [hidden] if read else []
        self.chunks_done += 1

    def run(self, context_ids: Tensor) -> Prefilled:
        """Run all chunks of a context (B, L), from the first."""
        for start, stop in self.bounds:
            self.advance(context_ids[:, start:stop])
        return self.result()

    def result(self) -> Prefilled:
        """Return the cache after the last chunk, with the press's results."""
        assert not self.chunks_left
        if self.local:
            detach(self.cache, self.uncut)
        if self.traits is None:
            return Prefilled(self.cache, self.next_position, [])
        for layer, weights in self.tracker.log_weights.items():
            if weights.shape[2] != self.cache.get_seq_length(layer):
                raise ValueError(
                    f"{self.traits.name} fades out {weights.shape[2]} keys, of which another press left "
                    f"{self.cache.get_seq_length(layer)}: take the fading press alone"
                )
        results = self.tracker.selections, self.press_context, self.hidden, self.tracker.positions, self.uncut
        return Prefilled(self.cache, self.next_position, *results)

    def _held(self) -> int:
        """Return the number of pairs per head in the first layer that presses evict from."""
        return self.cache.get_seq_length(self.layers[0])

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor that the next chunk depends on, by names that ``safetensors`` accepts; not copied.

        Gradients flow through it. Results of the chunks so far (scores, losses) are not in it.
        """
        state = {} if self.traits is None else self.tracker.state_dict()
        for index, layer in enumerate(self.cache.layers):
            state |= {f"{name}.{index}": tensor for name, tensor in tensors_of(layer).items()}
        if self.press_context is not None and self.press_context.token_ids is not None:
            state["token_ids"] = self.press_context.token_ids
        return state | {"chunks_done": torch.tensor(self.chunks_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state``, taken from a prefill with the same arguments."""
        decoder = decoder_of(self.model)
        own = [
            {name: state[f"{name}.{index}"] for name in (*PAIRS, *CARRIED) if f"{name}.{index}" in state}
            for index in range(len(decoder.layers))
        ]
        places = [layer_device(layer) for layer in decoder.layers]
        self.cache = cache_of(
            {name: tensor.to(place) for name, tensor in tensors.items()}
            for tensors, place in zip(own, places, strict=True)
            if tensors
        )
        if self.traits is not None:
            self.tracker.load_state_dict(state, places)
        if self.press_context is not None:
            self.press_context.token_ids = state.get("token_ids")
        self.chunks_done = int(state["chunks_done"])

    def _keywords(self, chunk_ids: Tensor) -> dict[str, Any]:
        """Return the forward's keywords for the press and for attention after evictions: see ``PressContext``."""
        if self.traits is None or self.press_context is None:
            return {}
        self.press_context.start = self.seen
        if self.traits.reads_tokens:
            before = self.press_context.token_ids
            self.press_context.token_ids = chunk_ids if before is None else torch.cat([before, chunk_ids], dim=1)
        return {PRESS_CONTEXT: self.press_context, "key_log_weights": self.press_context.key_log_weights}

    @contextmanager
    def _evicting(self, held: int, start: int, stop: int) -> Iterator[None]:
        """Apply the press at this chunk's ratio; in evaluation, training-only presses keep everything."""
        if self.traits is None or self.deciding is None:
            yield
            return
        ratios = list[tuple[BasePress, float]]()
        if self.ratio is not None:
            ratios = [(self.deciding.press, chunk_ratio(held + stop - start, stop, self.ratio, self.budget))]
        if self.deciding.only_trains and not self.model.training:  # also in wrappers that only ask for scores
            ratios += [(scorer, 0.0) for scorer in scorers_in(self.deciding.press)]
        uneven = ratio_by_layer(self, start, stop) if self.decoding else nullcontext()
        with at_ratios(ratios), uneven, applied(self.model, self.traits, self.tracker(self.cache, stop)):
            yield


def prefill(
    model: PreTrainedModel,
    context_ids: Tensor,
    press: BasePress | None,
    chunk_tokens: int | None = None,
    budget: int | None = None,
    request: Request = NOTHING,
) -> Prefilled:
    """Run a context (B, L) through ``model`` and evict after every chunk. See ``ChunkedPrefill``."""
    return ChunkedPrefill(model, press, context_ids.shape[1], chunk_tokens, budget, request).run(context_ids)


def full_cache(model: PreTrainedModel, context_ids: Tensor, continuation_ids: Tensor) -> Tensor:
    """Return the hidden states (B, T, E) of a continuation (B, T) after its whole context (B, L), without eviction."""
    prefilled = prefill(model, context_ids, None)
    return continue_from(model, continuation_ids, prefilled.cache, prefilled.next_position)


def continue_from(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: DynamicCache,
    position: int | Tensor,
    *,
    decoding: bool = False,
    lengths: Tensor | None = None,
    **attention: Any,
) -> Tensor:
    """Run tokens (B, T) after ``cache``, appending their pairs to it; return their hidden states (B, T, E).

    ``position`` is the first token's: one number for all rows, or (B,). ``decoding`` marks the forward as no prefill,
    so presses do not evict. ``lengths`` (B,) are the rows' tokens before their padding on the right, which only layers
    without attention need; ``attention`` are keywords of ``cached_attention``.
    """
    count, first = input_ids.shape[1], position.view(-1, 1) if isinstance(position, Tensor) else position
    if isinstance(position, int):
        check_next_tokens(model, cache, position, count)
    places = torch.arange(count, device=input_ids.device) + first
    carried, reached = carrying(model, cache, attention.get("caches"), lengths), set[int]()
    with attention_implementation(model, CACHED), carried:
        output = decoder_of(model)(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            position_ids=places.view(-1, count),
            # kvpress presses only in a forward whose last cache_position is its length - 1, so it counts from 0 in
            # every chunk; our attention does not use it. On the CPU, because presses read it in every layer.
            cache_position=torch.arange(count) + decoding,
            **({TOKEN_IDS: input_ids, "reached": reached} | attention),
        )
    check_reached(model, reached)
    return output.last_hidden_state
