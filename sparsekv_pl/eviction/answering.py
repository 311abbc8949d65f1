"""The rows that answer after one cache: they read their questions, and each leaves when it has said all it may."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from sparsekv_pl.eviction.kept_positions import Masked, masked_keys
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled

Enough = Callable[[list[int]], bool]
"""Whether an answer so far needs no more tokens."""


@dataclass
class _RowsLayer:
    """One layer's pairs, with room for more."""

    keys: Tensor
    """(B, K, held + room, D); on a CPU in float32, in which a single query attends there."""
    values: Tensor
    held: int

    @classmethod
    def of(cls, layer: CacheLayerMixin, room: int) -> Self:
        """Take over the pairs of a cache's layer, which is left empty."""
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        layer.keys = layer.values = None
        return cls(_with_room(keys, room), _with_room(values, room), keys.shape[2])

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The first rows' pairs, with one more each: ``key`` and ``value`` (rows, K, 1, D)."""
        rows, self.held = len(key), self.held + 1
        self.keys[:rows, :, self.held - 1], self.values[:rows, :, self.held - 1] = key[:, :, 0], value[:, :, 0]
        return self.keys[:rows, :, : self.held], self.values[:rows, :, : self.held]

    def move(self, source: int, target: int) -> None:
        """One row's pairs to another's place."""
        for pairs in (self.keys, self.values):
            pairs[target, :, : self.held] = pairs[source, :, : self.held]


class Answering:
    """Rows after one cache, and what they have said so far. A ``RowCache`` of attention/evicted_attention.py.

    Rows that go on fill the first places: where one leaves, the last takes its place.

    Parameters
    ----------
    model, prefilled
        The cache is used up: give a copy to keep it.
    questions, lengths
        (B, T), padded on the right to the longest, and how many tokens (B,) of each row count.
    most
        Tokens that each row may say, at least one.
    """

    def __init__(
        self, model: PreTrainedModel, prefilled: Prefilled, questions: Tensor, lengths: Tensor, most: Sequence[int]
    ) -> None:
        assert min(most) > 0, most
        rows = torch.arange(len(questions), device=questions.device)
        hidden = continue_from(model, questions, prefilled.cache, prefilled.next_position)
        self.last = hidden[rows, lengths - 1]
        """(B, E), hidden states of the questions' last tokens."""
        self.most = most
        self.answers: list[list[int]] = [[] for _ in most]
        self.places = list(range(len(most)))
        """The row in each place."""
        self.positions = lengths + prefilled.next_position
        """(places,), of the tokens that come next."""
        self.visible = torch.arange(questions.shape[1], device=lengths.device) < lengths[:, None]
        self.masked = masked_keys(model)
        self._layers = [_RowsLayer.of(layer, max(most) - 1) for layer in prefilled.cache.layers]
        self.seconds = 0.0
        """Of the answers' attention to this cache; on a GPU, until it was queued."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Of keys and values, those to come with them."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def hear(self, said: Sequence[int], stop_ids: Collection[int], enough: Enough | None = None) -> list[int]:
        """Take the token that the row in each place says; the former places of those that go on.

        A row leaves at a stop token, at its last token, and where ``enough`` says so of its answer.
        """
        stay = list(range(len(said)))
        for place in reversed(range(len(said))):
            answer, most = self.answers[self.places[place]], self.most[self.places[place]]
            stopped = said[place] in stop_ids
            if not stopped:
                answer.append(said[place])
            if stopped or len(answer) == most or (enough is not None and enough(answer)):
                self._leave(place)
                stay[place] = stay[-1]
                stay.pop()
        return stay

    def go_on(self) -> Tensor:
        """The positions (places,) of the next tokens, which every row sees of its own."""
        positions, self.positions = self.positions, self.positions + 1
        self.visible = torch.cat([self.visible, self.visible.new_ones(len(self.visible), 1)], dim=1)
        return positions

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (places, K, S, D) of a layer, its newest (places, K, 1, D) last."""
        return self._layers[layer].joined(key, value)

    def _leave(self, place: int) -> None:
        last = len(self.places) - 1
        if place != last:
            self.places[place] = self.places[last]
            for values in (self.positions, self.visible):
                values[place] = values[last]
            for layer in self._layers:
                layer.move(last, place)
        self.places.pop()
        self.positions, self.visible = self.positions[:last], self.visible[:last]
        self.masked = [None if masked is None else _moved(masked, last, place) for masked in self.masked]


def _with_room(pairs: Tensor, room: int) -> Tensor:
    """(B, K, S, D) in front of ``room`` pairs that are still to come."""
    rows, heads, held, dim = pairs.shape
    dtype = torch.float32 if pairs.device.type == "cpu" else pairs.dtype
    roomy = torch.empty(rows, heads, held + room, dim, dtype=dtype, device=pairs.device)
    roomy[:, :, :held] = pairs
    return roomy


def _moved(masked: Masked, source: int, target: int) -> Masked:
    """Hidden pairs without those of the row ``target``, whose place the row ``source`` takes."""
    rows, *where = masked
    kept = rows != target
    return rows.masked_fill(rows == source, target)[kept], *(index[kept] for index in where)
