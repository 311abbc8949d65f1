"""Prefill with eviction: the context runs through the model in chunks and a press shrinks the cache after each of them.

One chunk is "prefill, press, continue"; with many, chunk n sees the cache as chunks 1..n-1 left it, as a server would
run it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from kvpress import BasePress, ChunkKVPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.cached import CACHED, attention_implementation
from sparsekv_pl.eviction.keeper import Keeper
from sparsekv_pl.eviction.shifted_rotary import queries_from
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.scores import (
    ONE_CHUNK,
    observation_window,
    press_name,
    presses_in,
    rerotates_keys,
    set_compression_ratio,
)
from sparsekv_pl.selection import Selection


@dataclass
class Prefilled:
    """A context's cache, ready to be continued."""

    cache: DynamicCache
    next_position: int
    """RoPE position of the first token that follows: the context's length, unless the press re-rotated the keys."""
    selections: list[Selection]

    def copy(self) -> "Prefilled":
        """One to continue from, while this one stays as it is."""
        return Prefilled(copy_cache(self.cache), self.next_position, self.selections)


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """The same keys and values in memory of their own."""
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert layer.keys is not None and layer.values is not None
        copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied


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
    check_chunks(press, bounds, with_scores)
    deciding = press.press if isinstance(press, EvictionAugPress) else press
    keeper = Keeper(press, deciding, with_scores, len(bounds) > 1)
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


def check_chunks(press: BasePress, bounds: list[tuple[int, int]], with_scores: bool) -> None:
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


def continue_from(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: DynamicCache,
    position: int | Tensor,
    *,
    decoding: bool = False,
    **attention: Any,
) -> Tensor:
    """Hidden states (B, T, E) of tokens (B, T) from ``position`` on, which attend to ``cache`` and join it.

    ``position`` is one for all rows, or (B,). ``decoding`` tells presses that this is no prefill; ``attention`` goes to
    ``cached_attention``.
    """
    tokens = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = torch.as_tensor(position, device=input_ids.device).view(-1, 1)
    with attention_implementation(model, CACHED):
        output = model.get_decoder()(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            position_ids=first + tokens,
            # kvpress takes a forward whose last cache_position is its length - 1 for a prefill, and presses only then.
            # Counting from 0 in every chunk makes it press in every chunk; our attention needs no cache_position.
            cache_position=tokens + 1 if decoding else tokens,
            **attention,
        )
    return output.last_hidden_state


def _chunk_ratio(held: int, seen: int, ratio: float, budget: int | None) -> float:
    """The ratio that leaves ``seen`` * (1 - ratio) pairs, at most ``budget``, of the ``held`` ones in the cache."""
    target = max(1, min(int(seen * (1 - ratio)), held, budget or held))
    # kvpress rounds held * (1 - ratio) down: half a pair more is safe.
    return 0.0 if target >= held else 1 - (target + 0.5) / held
