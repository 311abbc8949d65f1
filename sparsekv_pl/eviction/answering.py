"""Greedy answering after one cache: rows read their questions, and each row leaves when its answer is complete."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from sparsekv_pl.eviction.cache_layers import CarriedState
from sparsekv_pl.eviction.kept_positions import Masked, masked_keys
from sparsekv_pl.eviction.limits import unscaled_positions
from sparsekv_pl.eviction.other_layers import check_next_tokens
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.models.layer_kinds import windowed_alone

Enough = Callable[[list[int]], bool]
"""Takes an answer's token ids so far; returns True if no more are needed."""


@dataclass
class _RowsLayer:
    """One layer's KV pairs, with allocated room for more."""

    keys: Tensor
    """(B, K, held + room, D); float32 on a CPU, where single queries attend in float32."""
    values: Tensor
    held: int

    @classmethod
    def of(cls, layer: CacheLayerMixin, room: int) -> Self:
        """Move the pairs out of a cache's layer, leaving it empty."""
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        layer.keys = layer.values = None
        return cls(_with_room(keys, room), _with_room(values, room), keys.shape[2])

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``key`` and ``value`` (rows, K, 1, D) to the first rows; return all pairs of those rows."""
        rows, self.held = len(key), self.held + 1
        self.keys[:rows, :, self.held - 1], self.values[:rows, :, self.held - 1] = key[:, :, 0], value[:, :, 0]
        return self.keys[:rows, :, : self.held], self.values[:rows, :, : self.held]

    def move(self, source: int, target: int) -> None:
        """Copy the pairs of row ``source`` to row ``target``."""
        for pairs in (self.keys, self.values):
            pairs[target, :, : self.held] = pairs[source, :, : self.held]


class Answering:
    """The rows that answer after one cache, and their answers so far: a ``RowCache`` (attention/evicted_attention.py).

    Unfinished rows fill the first places: when a row leaves, the last one takes its place.

    Parameters
    ----------
    model, prefilled
        The cache is consumed: pass a copy to keep it.
    questions, lengths
        Token ids (B, T), padded on the right to the longest, and the number of real tokens (B,) in each row.
    most
        Most tokens of each row's answer, at least 1.
    """

    def __init__(
        self, model: PreTrainedModel, prefilled: Prefilled, questions: Tensor, lengths: Tensor, most: Sequence[int]
    ) -> None:
        assert min(most) > 0, most
        rows = torch.arange(len(questions), device=questions.device)
        limited = windowed_alone(model.config) is not None or unscaled_positions(model.config) is not None
        if limited:  # reading the lengths waits for the GPU
            longest = max(map(sum, zip(lengths.tolist(), most, strict=True))) - 1
            check_next_tokens(model, prefilled.cache, prefilled.next_position, longest)
        hidden = continue_from(model, questions, prefilled.cache, prefilled.next_position, lengths=lengths)
        self.last = hidden[rows, lengths - 1]
        """(B, E), hidden states of each question's last token."""
        self.most = most
        self.answers: list[list[int]] = [[] for _ in most]
        self.places = list(range(len(most)))
        """The row in each place."""
        self.positions = lengths + prefilled.next_position
        """(places,), positions of the next tokens."""
        self.visible = torch.arange(questions.shape[1], device=lengths.device) < lengths[:, None]
        self.masked = masked_keys(model)
        layers = list(enumerate(prefilled.cache.layers))
        states = {index: layer.states for index, layer in layers if isinstance(layer, CarriedState)}
        self._states = states
        self._layers = {index: _RowsLayer.of(own, max(most) - 1) for index, own in layers if own.keys is not None}
        self.seconds = 0.0
        """Seconds that the answers' attention to this cache took; on a GPU, the time until it was queued."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, including the room allocated for answers, and of states."""
        states = sum(tensor.nbytes for own in self._states.values() for tensor in own.values())
        return states + sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers.values())

    def append(self, tokens: Sequence[int], stop_ids: Collection[int], enough: Enough | None = None) -> list[int]:
        """Append one token to the answer in each place; return the former places of the rows that continue.

        A row leaves at a stop token, at its last allowed token, and when ``enough`` returns True for its answer.
        """
        stay = list(range(len(tokens)))
        for place in reversed(range(len(tokens))):
            answer, most = self.answers[self.places[place]], self.most[self.places[place]]
            stopped = tokens[place] in stop_ids
            if not stopped:
                answer.append(tokens[place])
            if stopped or len(answer) == most or (enough is not None and enough(answer)):
                self._leave(place)
                stay[place] = stay[-1]
                stay.pop()
        return stay

    def next_positions(self) -> Tensor:
        """Return the positions (places,) of the next tokens and make those tokens visible to their own rows."""
        positions, self.positions = self.positions, self.positions + 1
        self.visible = torch.cat([self.visible, self.visible.new_ones(len(self.visible), 1)], dim=1)
        return positions

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's newest pairs (places, K, 1, D) and return all its keys and values (places, K, S, D)."""
        return self._layers[layer].joined(key, value)

    def carried(self, layer: int) -> dict[str, Tensor]:
        """Return the states (places, ...) of a layer without attention."""
        return self._states[layer]

    def _leave(self, place: int) -> None:
        last = len(self.places) - 1
        if place != last:
            self.places[place] = self.places[last]
            for values in (self.positions, self.visible):
                values[place] = values[last]
            for layer in self._layers.values():
                layer.move(last, place)
            for own in self._states.values():
                for state in own.values():
                    state[place] = state[last]
        self.places.pop()
        self.positions, self.visible = self.positions[:last], self.visible[:last]
        self.masked = [None if masked is None else _moved(masked, last, place) for masked in self.masked]


def _with_room(pairs: Tensor, room: int) -> Tensor:
    """Copy ``pairs`` (B, K, S, D) into a tensor (B, K, S + room, D)."""
    rows, heads, held, dim = pairs.shape
    dtype = torch.float32 if pairs.device.type == "cpu" else pairs.dtype
    roomy = torch.empty(rows, heads, held + room, dim, dtype=dtype, device=pairs.device)
    roomy[:, :, :held] = pairs
    return roomy


def _moved(masked: Masked, source: int, target: int) -> Masked:
    """Drop the masked pairs of row ``target`` and renumber row ``source`` to ``target``."""
    rows, *where = masked
    kept = rows != target
    return rows.masked_fill(rows == source, target)[kept], *(index[kept] for index in where)
