"""SpanDropoutPress: the base class of presses that drop whole spans of the context in training."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv_pl.models.compression_ratio import check_at_least, check_compression_ratio
from sparsekv_pl.models.devices import sent
from sparsekv_pl.models.seeding import generator_for
from sparsekv_pl.presses.key_tokens import TOKEN_IDS, key_places
from sparsekv_pl.presses.position_order import InOrderPress
from sparsekv_pl.presses.press_context import press_context_in
from sparsekv_pl.presses.step_draws import Draws


@dataclass(frozen=True)
class Shown:
    """The arguments that a press gets for one layer."""

    module: nn.Module
    hidden_states: Tensor
    """(B, L, E) of the newest tokens."""
    keys: Tensor
    """(B, K, S, D)."""
    kwargs: Mapping[str, Any]
    place: Tensor
    """(B, S) int64: a key's number among the real ones of its row, from 0; -1 where it is padding."""

    @property
    def layer(self) -> int:
        """The layer's index."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @cached_property
    def firsts(self) -> list[int]:
        """The context position of each row's first new token, which identifies a chunk or a decoded token.

        Taken from the press context if there is one: position_ids start at the same number in every chunk once a budget
        is full and keys are re-rotated. Llama 4 passes its attention no position_ids.
        """
        press_context = press_context_in(self.kwargs)
        if press_context is not None:
            return [press_context.start] * len(self.keys)
        positions = self.kwargs.get("position_ids")
        first = (self.kwargs["cache_position"][None] if positions is None else positions).amin(1)
        return [int(number) for number in first.expand(len(self.keys)).tolist()]

    @cached_property
    def rows(self) -> list[int]:
        """A number for each row, by its new tokens in this project's prefill, else by its index in the batch."""
        press_context = press_context_in(self.kwargs)
        return (
            list(range(len(self.keys))) if press_context is None else press_context.row_numbers(self.kwargs[TOKEN_IDS])
        )


@dataclass
class SpanDropoutPress(Draws, InOrderPress):
    """Drop whole spans of neighbouring tokens in training; keep everything in evaluation.

    Subclasses define the spans (``spans``) and, if they are not random, their priorities (``priority``). Exactly the
    budget stays, so one span per head is dropped in part: its first tokens go first, because the hidden states of its
    last tokens have seen them. The draw depends on ``seed``, the step, the layer, the chunk's position, the row's
    tokens in the chunk (outside this project's prefill: the row's index) and the KV head, but not on other rows. A
    later chunk of a prefill chooses among the keys in the cache.

    Padding is evicted first. Wrappers that only use scores (AdaKVPress, ChunkPress, KeyRerotationPress) do not check
    whether the model is in training: outside this project's prefill they evict in evaluation too. ChunkPress passes its
    parts one by one: each has its own protected ends, and all share one draw.

    Parameters
    ----------
    compression_ratio
        Fraction of KV pairs that is removed.
    protect_start
        Number of first tokens (attention sinks) that are never dropped while they fit the budget.
    protect_recent
        Number of last tokens that are never dropped while they fit beside ``protect_start``; if not, the newest stay.
    seed
        Seed of the draws.
    shared
        Drop the same spans in every layer and KV head, so that no layer keeps a dropped token.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    compression_ratio: float = 0.0
    protect_start: int = 4
    protect_recent: int = 64
    seed: int = 0
    shared: bool = False
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_compression_ratio(f"{type(self).__name__}.compression_ratio", self.compression_ratio)
        for name in ("protect_start", "protect_recent", "seed"):
            self.check_at_least(name, 0)

    def check_at_least(self, name: str, minimum: float, whole: bool = True) -> None:
        """Raise ``ValueError`` if the setting ``name`` is below ``minimum``, or no ``whole`` number."""
        check_at_least(f"{type(self).__name__}.{name}", getattr(self, name), minimum, whole)

    def draw(self, step: int) -> None:
        """Draw the spans of optimizer step ``step``."""
        self.step = step

    @abstractmethod
    def spans(self, shown: Shown) -> Tensor:
        """Return the number of each key's span, (B, 1 or K, S) int64, from 0 and increasing along a row's real keys."""

    def most_spans(self, shown: Shown) -> int:
        """Return N, an upper bound of the number of spans; counting them would synchronise with the GPU."""
        return shown.keys.shape[2]

    def priority(self, shown: Shown, spans: Tensor) -> Tensor:  # noqa: ARG002
        """Return the priorities (B, 1 or K, N) of N spans, finite; the highest are kept. Random unless overridden."""
        return self.uniform(shown, self.most_spans(shown))

    def uniform(self, shown: Shown, count: int, stream: int = 0) -> Tensor:
        """Draw (B, 1 or K, ``count``) float64 in [0, 1); each ``stream`` has its own numbers.

        A larger ``count`` starts with the same numbers, so padding changes no draw. Heads that share one draw have 1
        instead of K.
        """
        heads, layer = (1, ()) if self.shared else (shown.keys.shape[1], (shown.layer,))
        generators = [
            generator_for("spans", type(self).__name__, self.seed, self.step, *layer, first, row, stream)
            for row, first in zip(shown.rows, shown.firsts, strict=True)
        ]
        drawn = [torch.rand(count, heads, dtype=torch.float64, generator=generator).T for generator in generators]
        return sent(torch.stack(drawn), shown.keys.device)

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,  # noqa: ARG002
        attentions: Tensor,  # noqa: ARG002
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Return scores (B, K, S) float32, distinct within a row and head; higher stays."""
        shown = Shown(module, hidden_states, keys, kwargs, key_places(keys, kwargs))
        spans = self.spans(shown)
        priority = self.priority(shown, spans)
        heads = max(spans.shape[1], priority.shape[1])
        at_key = priority.expand(-1, heads, -1).gather(-1, spans.expand(-1, heads, -1))
        return self._ranked(at_key, shown.place).expand(-1, keys.shape[1], -1).contiguous()

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return all pairs in evaluation, those that score highest in training."""
        if not module.training:
            return keys, values
        return super().compress(module, hidden_states, keys, values, attentions, kwargs)

    def _ranked(self, priority: Tensor, place: Tensor) -> Tensor:
        """Rank keys (B, 1 or K, S) float32: padding lowest, then spans by ``priority``, then protected keys."""
        length = place.shape[1]
        place = place[:, None]
        start = (place >= 0) & (place < self.protect_start)
        recent = (place >= 0) & (place > place.amax(-1, keepdim=True) - self.protect_recent)
        ordered = priority.masked_fill(start | recent, torch.inf).masked_fill(place < 0, -torch.inf)
        # A stable sort keeps the keys of a span, which have one priority, together and in order.
        rank = ordered.argsort(dim=-1, stable=True).argsort(dim=-1)
        rank = rank.where(~recent, length + place).where(~start, 3 * length - place)
        return rank.float()
