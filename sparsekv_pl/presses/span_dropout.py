"""SpanDropoutPress: what all presses have in common that drop whole stretches of the context in training."""

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
    """One layer, as a press is shown it."""

    module: nn.Module
    hidden_states: Tensor
    """(B, L, E), of the newest tokens."""
    keys: Tensor
    """(B, K, S, D)."""
    kwargs: Mapping[str, Any]
    place: Tensor
    """(B, S) int64: a key's number among the real ones of its row, from 0; -1 where it is padding."""

    @property
    def layer(self) -> int:
        """Which one."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @cached_property
    def firsts(self) -> list[int]:
        """Per row, the context position of the first new token: what tells one chunk, or decoded token, from another.

        A prefill of ours says so; position_ids start at the same number in every chunk when a budget is full and keys
        are re-rotated. Llama 4 tells its attention no position_ids.
        """
        press_context = press_context_in(self.kwargs)
        if press_context is not None:
            return [press_context.start] * len(self.keys)
        positions = self.kwargs.get("position_ids")
        first = (self.kwargs["cache_position"][None] if positions is None else positions).amin(1)
        return [int(number) for number in first.expand(len(self.keys)).tolist()]

    @cached_property
    def rows(self) -> list[int]:
        """A number for each row, by its new tokens where they are told (in a prefill of ours), else by its place."""
        press_context = press_context_in(self.kwargs)
        return (
            list(range(len(self.keys))) if press_context is None else press_context.row_numbers(self.kwargs[TOKEN_IDS])
        )


@dataclass
class SpanDropoutPress(Draws, InOrderPress):
    """Drop spans of neighbouring tokens, whole ones, while the model is in training; keep everything in evaluation.

    Subclasses say where the spans are (``spans``) and, if not by lot, which stay longest (``priority``). Exactly the
    budget stays, so one span of each head is cut: its first tokens go first, because the hidden states of its last ones
    have seen them. The draw depends on ``seed``, the step, the layer, the position of the chunk, the row's tokens in it
    (outside our prefill: the row's place) and the KV head, and on nothing in the other rows. A later chunk of a prefill
    chooses among the keys that are in the cache.

    Padding goes first. Wrappers that ask for scores alone (AdaKVPress, ChunkPress, KeyRerotationPress) do not ask
    whether the model is in training: outside our prefill they evict in evaluation too. ChunkPress shows its parts one
    by one: each has protected ends of its own, and all have one draw.

    Parameters
    ----------
    compression_ratio
        Fraction of KV pairs that is removed.
    protect_start
        The first tokens (attention sinks), never dropped while they fit the budget.
    protect_recent
        The last tokens, never dropped while they fit beside ``protect_start``; if they do not, the newest stay.
    seed
        Of the draws.
    shared
        Drop the same spans in every layer and KV head, so that nothing of what is dropped is left anywhere.
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
        """Raise ``ValueError`` where the setting ``name`` is below ``minimum``, or no ``whole`` number."""
        check_at_least(f"{type(self).__name__}.{name}", getattr(self, name), minimum, whole)

    def draw(self, step: int) -> None:
        """Drop other spans than at other steps."""
        self.step = step

    @abstractmethod
    def spans(self, shown: Shown) -> Tensor:
        """(B, 1 or K, S) int64: the number of each key's span, from 0 and rising along the real keys of a row."""

    def most_spans(self, shown: Shown) -> int:
        """N, as many spans as there can be: to count them a GPU would be waited for in every layer."""
        return shown.keys.shape[2]

    def priority(self, shown: Shown, spans: Tensor) -> Tensor:  # noqa: ARG002
        """(B, 1 or K, N), finite: of N spans, those with the highest stay longest. Drawn, unless overridden."""
        return self.uniform(shown, self.most_spans(shown))

    def uniform(self, shown: Shown, count: int, stream: int = 0) -> Tensor:
        """(B, 1 or K, ``count``) float64 in [0, 1), drawn; other numbers in another ``stream``.

        More of them begin with the same ones, so padding changes no draw. 1 instead of K where all heads share theirs.
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
        """(B, K, S) float32, all of a row and head different: how long each key stays."""
        shown = Shown(module, hidden_states, keys, kwargs, key_places(keys, kwargs))
        spans = self.spans(shown)
        priority = self.priority(shown, spans)
        heads_told = max(spans.shape[1], priority.shape[1])
        at_key = priority.expand(-1, heads_told, -1).gather(-1, spans.expand(-1, heads_told, -1))
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
        """Everything in evaluation, what scores highest in training."""
        if not module.training:
            return keys, values
        return super().compress(module, hidden_states, keys, values, attentions, kwargs)

    def _ranked(self, priority: Tensor, place: Tensor) -> Tensor:
        """(B, 1 or K, S) float32 of the priorities of keys (B, 1 or K, S): padding, then spans, then protected keys."""
        length = place.shape[1]
        place = place[:, None]
        start = (place >= 0) & (place < self.protect_start)
        recent = (place >= 0) & (place > place.amax(-1, keepdim=True) - self.protect_recent)
        ordered = priority.masked_fill(start | recent, torch.inf).masked_fill(place < 0, -torch.inf)
        # Stable: the keys of a span have one priority, so they stay together and in order.
        rank = ordered.argsort(dim=-1, stable=True).argsort(dim=-1)
        rank = rank.where(~recent, length + place).where(~start, 3 * length - place)
        return rank.float()
