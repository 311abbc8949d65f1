"""Which context positions a cache still holds while it is filled chunk by chunk."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from kvpress import BasePress, KeyRerotationPress, MergingPress
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.presses.scores import CaughtScores, catch_scores, press_name
from sparsekv_pl.selection import Selection


class Keeper:
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
