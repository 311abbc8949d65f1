"""Real eviction: the context runs through the model in chunks and a press shrinks the cache after each of them.

The same functions, with and without gradients, serve training and evaluation, so the two cannot drift apart. One chunk
is "prefill, press, continue"; with many, chunk n sees the cache as chunks 1..n-1 left it, as a server would run it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from kvpress import BasePress, ChunkKVPress, KeyRerotationPress, MergingPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.cached import CACHED, attention_implementation
from sparsekv_pl.eviction.result import Evicted
from sparsekv_pl.eviction.shifted_rotary import queries_from
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.scores import (
    ONE_CHUNK,
    CaughtScores,
    catch_scores,
    observation_window,
    press_name,
    presses_in,
    rerotates_keys,
    set_compression_ratio,
)
from sparsekv_pl.selection import Selection


@dataclass
class ChunkedEviction:
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
    catch_scores
        Keep the press's scores, differentiable, for a selection loss.
    """

    press: BasePress
    chunk_tokens: int | None = None
    budget: int | None = None
    catch_scores: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token, or null")

    def check(self, context_tokens: int) -> None:
        """Raise ``ValueError`` if a chunk would be too short for the press, or the press cannot be run in chunks."""
        _check_chunks(self.press, chunk_bounds(context_tokens, self.chunk_tokens), self.catch_scores)

    def __call__(
        self,
        model: PreTrainedModel,
        context_ids: Tensor,
        continuation_ids: Tensor,
        *,
        compression_ratio: float,
        step: int,
    ) -> Evicted:
        """Run context and continuation with an eviction between the two. See ``Eviction``."""
        press = self.press
        if isinstance(press, EvictionAugPress):
            press.draw(step)
        set_compression_ratio(press, compression_ratio)
        prefilled = prefill(model, context_ids, press, self.chunk_tokens, self.budget, self.catch_scores)
        kept = mean_length(prefilled.cache)
        hidden = continue_from(model, continuation_ids, prefilled.cache, prefilled.next_position)
        return Evicted(hidden, kept / context_ids.shape[1], prefilled.selections)


@dataclass
class Prefilled:
    """A context's cache, ready to be continued."""

    cache: DynamicCache
    next_position: int
    """RoPE position of the first token that follows: the context's length, unless the press re-rotated the keys."""
    selections: list[Selection]


def mean_length(cache: DynamicCache) -> float:
    """KV pairs per head that ``cache`` holds, averaged over layers."""
    return sum(cache.get_seq_length(layer) for layer in range(len(cache.layers))) / len(cache.layers)


def chunk_bounds(tokens: int, chunk_tokens: int | None) -> list[tuple[int, int]]:
    """Cut ``tokens`` into the fewest chunks of at most ``chunk_tokens``, equal to within one token."""
    count = 1 if chunk_tokens is None else -(-tokens // chunk_tokens)
    edges = [tokens * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def prefill(
    model: PreTrainedModel,
    context_ids: Tensor,
    press: BasePress | None,
    chunk_tokens: int | None = None,
    budget: int | None = None,
    with_scores: bool = False,
) -> Prefilled:
    """Run a context (B, L) through ``model`` and evict after every chunk.

    With many chunks the compression ratio of each is set so that, of the tokens seen so far, the share that the press
    was set to (and no more than ``budget``) stays.
    """
    bounds = chunk_bounds(context_ids.shape[1], chunk_tokens)
    _check_sliding_window(model, context_ids.shape[1])
    cache = DynamicCache()
    if press is None:
        for start, stop in bounds:
            continue_from(model, context_ids[:, start:stop], cache, start)
        return Prefilled(cache, context_ids.shape[1], [])
    _check_chunks(press, bounds, with_scores)
    deciding = press.press if isinstance(press, EvictionAugPress) else press
    keeper = _Keeper(press, deciding, with_scores, len(bounds) > 1)
    with _restored_ratio(deciding) if len(bounds) > 1 or budget is not None else nullcontext() as ratio:
        for start, stop in bounds:
            held = cache.get_seq_length()
            position = held if rerotates_keys(deciding) else start
            if ratio is not None:
                set_compression_ratio(deciding, _chunk_ratio(held + stop - start, stop, ratio, budget))
            with keeper(cache, stop), press(model), queries_from(model, position):
                continue_from(model, context_ids[:, start:stop], cache, position)
    next_position = cache.get_seq_length() if rerotates_keys(deciding) else context_ids.shape[1]
    return Prefilled(cache, next_position, keeper.selections)


@contextmanager
def _restored_ratio(press: BasePress) -> Iterator[float]:
    """The ratio of ``press``, which is set to it again after the block. ``ValueError`` if it has none to set."""
    ratio = press.compression_ratio
    set_compression_ratio(press, ratio)
    try:
        yield ratio
    finally:
        set_compression_ratio(press, ratio)


def _check_chunks(press: BasePress, bounds: list[tuple[int, int]], with_scores: bool) -> None:
    """Raise ``ValueError`` where ``press`` cannot be run in chunks of these bounds."""
    shortest, window = min(stop - start for start, stop in bounds), observation_window(press)
    if shortest <= window:
        raise ValueError(
            f"{press_name(press)} looks at a window of {window} tokens but the context is run in chunks of {shortest}: "
            "use a longer context, longer chunks (chunk_tokens) or a smaller window_size (n_sink)"
        )
    # ChunkKVPress moves groups of pairs: its scores do not tell which it kept.
    unfit = (*ONE_CHUNK, ChunkKVPress) if with_scores else ONE_CHUNK
    if len(bounds) > 1 and any(isinstance(inner, unfit) for inner in presses_in(press)):
        raise ValueError(
            f"{press_name(press)} cannot evict from {len(bounds)} chunks: it masks KV pairs instead of removing them, "
            "or looks at the whole context at once. Use one chunk (chunk_tokens: null) or another press"
        )


def _check_sliding_window(model: PreTrainedModel, tokens: int) -> None:
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and tokens > window:
        raise ValueError(
            f"a context of {tokens} tokens is longer than this model's sliding window of {window}, which an evicted "
            "cache cannot keep: use shorter contexts, or a model without sliding windows"
        )


def full_cache(model: PreTrainedModel, context_ids: Tensor, continuation_ids: Tensor) -> Tensor:
    """Hidden states (B, T, E) of a continuation (B, T) after its whole context (B, L): nothing is evicted."""
    prefilled = prefill(model, context_ids, None)
    return continue_from(model, continuation_ids, prefilled.cache, prefilled.next_position)


def continue_from(model: PreTrainedModel, input_ids: Tensor, cache: DynamicCache, position: int) -> Tensor:
    """Hidden states (B, T, E) of tokens (B, T) from ``position`` on, which attend to ``cache`` and join it."""
    tokens = torch.arange(input_ids.shape[1], device=input_ids.device)
    with attention_implementation(model, CACHED):
        output = model.get_decoder()(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            position_ids=(position + tokens).unsqueeze(0),
            # kvpress takes a forward whose last cache_position is its length - 1 for a prefill, and presses only then.
            # Counting from 0 in every chunk makes it press in every chunk; our attention needs no cache_position.
            cache_position=tokens,
        )
    return output.last_hidden_state


def _chunk_ratio(held: int, seen: int, ratio: float, budget: int | None) -> float:
    """The ratio that leaves ``seen`` * (1 - ratio) pairs, at most ``budget``, of the ``held`` ones in the cache."""
    target = max(1, min(int(seen * (1 - ratio)), held, budget or held))
    # kvpress rounds held * (1 - ratio) down: half a pair more is safe.
    return 0.0 if target >= held else 1 - (target + 0.5) / held


class _Keeper:
    """Notes scores, and puts kept pairs back in the order of their positions.

    A ScorerPress leaves pairs in the order of their scores. Attention does not mind, but a later chunk's press that
    protects the first tokens (sinks) or compares neighbours does, so between chunks the order is restored. The same
    indices say which context position every pair came from, which a selection loss over later chunks needs.
    """

    def __init__(self, press: BasePress, deciding: BasePress, with_scores: bool, many_chunks: bool) -> None:
        self.press = press
        self.deciding = deciding.press if isinstance(deciding, (KeyRerotationPress, MergingPress)) else deciding
        self.in_order = isinstance(deciding, KeyRerotationPress)
        self.with_scores = with_scores
        self.many_chunks = many_chunks
        self.selections: list[Selection] = []
        self.positions: dict[int, Tensor] = {}

    @contextmanager
    def __call__(self, cache: DynamicCache, seen: int) -> Iterator[None]:
        """Look after one chunk; ``seen`` counts the context's tokens to its end."""
        if not (self.with_scores or self.many_chunks):
            yield
            return
        with catch_scores(self.press) as caught:
            yield
        for scored in caught:
            self._note(scored, cache, seen)

    def _note(self, scored: CaughtScores, cache: DynamicCache, seen: int) -> None:
        positions = self._positions(scored, seen) if self.many_chunks else None
        if self.with_scores:
            if positions is None and scored.scores.shape[-1] != seen:
                raise ValueError(
                    f"{press_name(self.press)} scores the context by parts, which a selection loss cannot follow: "
                    "take a press that scores it at once, or leave the selection objective out"
                )
            self.selections.append(Selection(scored.layer, press_name(scored.scorer), scored.scores, positions))
        if positions is not None and scored.scorer is self.deciding:
            self._restore_order(scored, positions, cache)

    def _positions(self, scored: CaughtScores, seen: int) -> Tensor:
        """Context positions of the scored keys: those kept before, then the newest tokens."""
        batch, heads, keys = scored.scores.shape
        before = self.positions.get(scored.layer)
        held = 0 if before is None else before.shape[-1]
        new = torch.arange(seen - (keys - held), seen, device=scored.scores.device).expand(batch, heads, -1)
        return new if before is None else torch.cat([before, new], dim=-1)

    def _restore_order(self, scored: CaughtScores, positions: Tensor, cache: DynamicCache) -> None:
        layer = cache.layers[scored.layer]
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        kept = keys.shape[2]
        indices = scored.scores.topk(kept, dim=-1).indices
        if kept < scored.scores.shape[-1]:
            ordered = indices.sort(dim=-1)
            if not self.in_order:
                index = ordered.indices.unsqueeze(-1).expand_as(keys)
                layer.keys, layer.values = keys.gather(2, index), values.gather(2, index)
            positions = positions.gather(-1, ordered.values)
        self.positions[scored.layer] = positions
