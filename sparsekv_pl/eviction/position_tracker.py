"""Track which context positions a cache holds while it is filled chunk by chunk."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from kvpress.utils import compute_n_kept
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.eviction.rotation import Rotation
from sparsekv_pl.presses.caught_scores import CaughtScores, catch_scores
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import compression_ratio_of
from sparsekv_pl.presses.traits import PressTraits


class PositionTracker:
    """Record scores, and restore kept pairs to the order of their positions.

    kvpress's ScorerPress leaves pairs in the order of their scores. Attention does not depend on the order, but a later
    chunk's press that protects the first tokens (sinks) or compares neighbours does, so the order is restored between
    chunks. The same indices give the context position of every pair, which a selection loss over later chunks needs.

    Parameters
    ----------
    traits
        Of the press that evicts.
    request
        Positions are tracked if ``request.contexts``; scores are recorded if ``request.scores``.
    many
        Whether there are several chunks; positions are then tracked too.
    layers
        The layers in which the press evicts.
    inv_freq
        The layers' RoPE frequencies (see ``Rotation``), for a press that re-rotates keys; else None.
    """

    def __init__(
        self,
        traits: PressTraits,
        request: Request,
        many: bool,
        layers: Sequence[int],
        inv_freq: Mapping[int, Tensor] | None,
    ) -> None:
        self.layers = layers
        deciding = self.deciding = traits.deciding
        self.press = traits.press
        self.selecting = deciding.selecting if deciding.by_scores else None
        self.order_only = {id(part.press) for part in traits.parts if part.order_only}
        self.in_order = deciding.in_order
        self.rotation = Rotation(inv_freq) if deciding.by_scores and inv_freq is not None else None
        self.with_scores, self.follow = request.scores, request.contexts or many
        self.selections: list[Selection] = []
        self.positions: dict[int, Tensor] = {}
        self.log_weights: dict[int, Tensor] = {}
        """layer -> (B, K, S), as the press wrote it into ``PressContext.key_log_weights``, in the order of the keys."""

    @contextmanager
    def __call__(self, cache: DynamicCache, seen: int) -> Iterator[None]:
        """Track one chunk inside the block; ``seen`` counts the context's tokens up to the chunk's end."""
        if not (self.with_scores or self.follow):
            yield
            return
        with catch_scores(self.press) as caught:
            yield
        for scored in caught:
            self._record(scored, cache, seen)
        if self.follow and self.selecting is not None:
            self._follow_unscored(cache, seen)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that the next chunk depends on, by name."""
        return {f"{name}.{layer}": tensor for name, kept in self._state().items() for layer, tensor in kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], devices: Sequence[torch.device]) -> None:
        """Restore ``state_dict``'s result, each layer's tensors on the device where the layer computes."""
        for name, kept in self._state().items():
            saved = {layer: state.get(f"{name}.{layer}") for layer in range(len(devices))}
            kept.clear()
            kept.update({layer: tensor.to(devices[layer]) for layer, tensor in saved.items() if tensor is not None})

    def _state(self) -> dict[str, dict[int, Tensor]]:
        rotation = {} if self.rotation is None else {"first": self.rotation.first, "places": self.rotation.places}
        return {"positions": self.positions, "log_weights": self.log_weights, **rotation}

    def _record(self, scored: CaughtScores, cache: DynamicCache, seen: int) -> None:
        positions = self._positions(scored, seen) if self.follow else None
        if self.with_scores:
            if positions is None and scored.scores.shape[-1] != seen:
                raise ValueError(
                    f"{press_name(self.press)} scores the context by parts, which a selection loss cannot follow: "
                    "take a press that scores it at once, or leave the selection objective out"
                )
            name, order_only = press_name(scored.scorer), id(scored.scorer) in self.order_only
            kept = self._budget(scored.scores.shape[-1])
            self.selections.append(Selection(scored.layer, name, scored.scores, positions, order_only, kept, seen))
        if positions is not None and scored.scorer is self.selecting:
            self._restore_order(scored, positions, cache)

    def _budget(self, keys: int) -> int:
        """Return how many of ``keys`` pairs this chunk's compression ratio leaves; all, for a press without a ratio."""
        if not self.deciding.takes_a_ratio:
            return keys
        return int(compute_n_kept(keys, compression_ratio_of(self.deciding.press)))

    def _follow_unscored(self, cache: DynamicCache, seen: int) -> None:
        """Extend the positions by a whole chunk where the press did not score: at a ratio of 0 everything stays."""
        for index in self.layers:
            layer = cache.layers[index]
            assert layer.keys is not None
            batch, heads, held = layer.keys.shape[:3]
            before = self.positions.get(index)
            missing = held - (0 if before is None else before.shape[-1])
            if missing:
                new = torch.arange(seen - missing, seen, device=layer.keys.device).expand(batch, heads, -1)
                self.positions[index] = new if before is None else torch.cat([before, new], dim=-1)

    def _positions(self, scored: CaughtScores, seen: int) -> Tensor:
        """Return the context positions (B, K, S) of the scored keys: those kept before, then the newest tokens'."""
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
            if self.rotation is not None:  # the press left them in order
                layer.keys = self.rotation(scored.layer, keys, ordered.values)
            elif not self.in_order:
                index = ordered.indices.unsqueeze(-1).expand_as(keys)
                layer.keys, layer.values = keys.gather(2, index), values.gather(2, index)
            positions = positions.gather(-1, ordered.values)
            if scored.layer in self.log_weights:
                self.log_weights[scored.layer] = self.log_weights[scored.layer].gather(-1, ordered.indices)
        self.positions[scored.layer] = positions
