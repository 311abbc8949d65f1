"""A continuation of an evicted context: read in one piece, or read and written with an eviction every few tokens.

Between two evictions nothing is removed, so tokens that run together see what each would see alone: a chunk of an
interval's or a turn's tokens with an eviction after it equals as many single tokens. Training, reading and writing all
run these chunks through ``ChunkedPrefill``.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.checkpointed_prefill import checkpointed_prefill
from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.limits import check_continuation
from sparsekv_pl.eviction.other_layers import forget
from sparsekv_pl.eviction.prefill import ChunkedPrefill, continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled, copy_cache
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.head import head_of
from sparsekv_pl.presses.ratio import set_compression_ratio


def continued(model: PreTrainedModel, prefilled: Prefilled, ids: Tensor) -> Tensor:
    """Run a continuation (B, T), appending its pairs to the cache; return its hidden states (B, T, E).

    Raises ``ValueError`` if it ends beyond the model's last position.
    """
    check_continuation(model, prefilled.next_position, ids.shape[1])
    weights = None if prefilled.press_context is None else prefilled.press_context.key_log_weights
    return continue_from(model, ids, prefilled.cache, prefilled.next_position, key_log_weights=weights)


class Continuation:
    """Tokens after a context, read or written, with an eviction after every ``decoding.interval`` or turn of them.

    Parameters
    ----------
    filling
        The finished prefill of the context, whose request follows positions (``Request.contexts``); its cache is shared
        and does not change. Its budget holds here too.
    decoding, compression_ratio
        When to evict, and the share that the press removes.
    tokens
        Most tokens of the continuation after which it may evict.
    turn_ends
        Tokens of the continuation after which a turn ends, rising.

    Raises
    ------
    ValueError
        If the press cannot evict again, or context and continuation take more positions than the model has.
    """

    def __init__(
        self,
        filling: ChunkedPrefill,
        decoding: Decoding,
        compression_ratio: float,
        tokens: int,
        turn_ends: Sequence[int] = (),
    ) -> None:
        assert filling.deciding is not None and filling.tracker.follow and not filling.chunks_left
        self.model, self.context_tokens = filling.model, filling.tokens
        ends = decoding.ends(filling.tokens, tokens, turn_ends)
        set_compression_ratio(filling.deciding.press, compression_ratio if decoding.grows else 0.0)
        self.reading = replace(
            filling,
            tokens=[filling.tokens, *ends][-1],
            budget=decoding.pairs(filling.tokens, compression_ratio, filling.budget),
            request=replace(filling.request, full_cache=False),
            local=False,
            given=[*filling.bounds, *pairwise([filling.tokens, *ends])],
            decoding=True,
        )
        self.reading.load_state_dict(filling.state_dict())
        self.kv_bytes = [(0, self._held_bytes())]
        """(tokens run, bytes that keys and values then hold), at the start and after each eviction."""

    def train(self, ids: Tensor, checkpoint: bool = False) -> tuple[Tensor, Prefilled]:
        """Run (B, T) tokens; return their hidden states (B, T, E), and the state after the last eviction.

        With ``checkpoint`` no activations are kept of tokens before that eviction: see ``checkpointed_prefill``.
        """
        whole = self._whole(ids)
        evicted = checkpointed_prefill(self.reading, ids[:, :whole]) if checkpoint else self._evict_from(ids[:, :whole])
        return self._with_rest(evicted, ids[:, whole:]), evicted

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Run (B, T) tokens; return their hidden states (B, T, E)."""
        whole, seen = self._whole(ids), self.reading.seen + ids.shape[1]
        hidden = self._with_rest(self._evict_from(ids[:, :whole]), ids[:, whole:])
        forget(self.model, self.reading.cache, seen, self.reading.layers)
        return hidden

    @torch.no_grad()
    def write(self, ids: Tensor, most: Sequence[int], stop_ids: Collection[int] = ()) -> list[list[int]]:
        """Read (B, T) tokens and decode greedily; return each row's new token ids, without the stop token.

        ``most`` has the most new tokens of each row, at least 1. New tokens are decoded one at a time; when an interval
        is full, its tokens run again as one chunk, with the press. The answer ends the last turn: nothing is evicted.
        """
        answers: list[list[int]] = [[] for _ in most]
        going, unread = set(range(len(most))), ids
        while True:
            while unread.shape[1] >= (together := self._together):
                self._advance(unread[:, :together])
                unread = unread[:, together:]
            room = together - unread.shape[1] if unread.shape[1] else 1
            wanted = [min(room, most[row] - len(answers[row])) if row in going else 1 for row in range(len(most))]
            said = self._decoded(unread, wanted, stop_ids)
            for row in sorted(going):
                answers[row] += said[row]
                if len(said[row]) < wanted[row] or len(answers[row]) == most[row]:
                    going.remove(row)
            if not going:
                return answers
            filled = [row + [0] * (room - len(row)) for row in said]  # rows that have ended run on, unseen by others
            unread = torch.cat([unread, torch.tensor(filled, device=ids.device)], dim=1)

    def _decoded(self, unread: Tensor, wanted: Sequence[int], stop_ids: Collection[int]) -> list[list[int]]:
        """Decode after ``unread`` (B, T) tokens; if T is 0, one token per row, from the last interval's last token."""
        reading, model = self.reading, self.model
        if unread.shape[1]:
            prefilled = Prefilled(copy_cache(reading.cache), reading.next_position, [])
            lengths = torch.full((len(unread),), unread.shape[1], device=unread.device)
            return greedy(model, prefilled, unread, lengths, wanted, stop_ids)
        head = head_of(model).to(torch.float32)  # as in greedy_together
        with torch.autocast(unread.device.type, enabled=False):
            newest = head.logits(reading.hidden[-1][:, -1].float()).argmax(-1).tolist()
        return [[] if token in stop_ids else [token] for token in newest]

    @property
    def _together(self) -> int:
        """Tokens up to the next eviction; without one, more than there can be."""
        reading = self.reading
        start, stop = reading.bounds[reading.chunks_done] if reading.chunks_left else (0, sys.maxsize)
        return stop - start

    def _whole(self, ids: Tensor) -> int:
        """Tokens of ``ids`` (B, T) up to the last eviction."""
        whole = self.reading.tokens - self.reading.seen
        assert whole <= ids.shape[1], (whole, ids.shape)
        return whole

    def _evict_from(self, ids: Tensor) -> Prefilled:
        while self.reading.chunks_left:
            together = self._together
            self._advance(ids[:, :together])
            ids = ids[:, together:]
        return self.reading.result()

    def _advance(self, ids: Tensor) -> None:
        self.reading.advance(ids)
        self.kv_bytes.append((self.reading.seen - self.context_tokens, self._held_bytes()))

    def _with_rest(self, evicted: Prefilled, rest: Tensor) -> Tensor:
        return torch.cat([*evicted.hidden, *([continued(self.model, evicted, rest)] if rest.shape[1] else [])], dim=1)

    def _held_bytes(self) -> int:
        return kept_memory(self.model, self.reading.cache).kv_bytes
