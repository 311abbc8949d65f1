"""The interface of all evictions, and the types that they return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.request import NOTHING, Request


@dataclass
class Selection:
    """The scores that one scorer gave to the keys of one layer."""

    layer: int
    press: str
    """The scorer's name."""
    scores: Tensor
    """(B, K, S), differentiable; higher stays."""
    positions: Tensor | None = None
    """(B, K, S) int64, the context position of each scored key; None means 0..S-1, as in a single prefill."""
    order_only: bool = False
    """True if the scores are not negative but only their order has a meaning. LagKV's softmax is over statistics that
    hardly differ, so its shares are nearly equal whatever was trained."""
    kept: int | None = None
    """KV pairs per head that the step's compression ratio leaves of these S; None: all."""
    seen: int | None = None
    """Tokens read when the press selected; None: the context's."""


@dataclass
class Evicted:
    """The continuation's hidden states under eviction, and what was evicted."""

    hidden: Tensor
    """(B, T, E), the input of the LM head."""
    kept_share: float
    """KV pairs kept / KV pairs of the context, mean over layers and KV heads."""
    selections: list[Selection] = field(default_factory=list)
    """The press's scores, per layer, chunk and scorer; empty unless ``Request.scores``."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Name -> scalar loss term that a press asks the objective to add (SparseRegPress)."""
    context: "EvictedContext | None" = None
    """For objectives that ask for evicted text; None unless ``Request.contexts``."""
    chunks: Tensor | None = None
    """(B, C, E), the hidden states of the context's last C tokens, all chunks but the first; None unless
    ``Request.chunks``."""
    first_chunk: Tensor | None = None
    """(B, F, E), the hidden states of the context's first F tokens, its first chunk; None unless
    ``Request.first_chunk``."""
    full_cache: Tensor | None = None
    """(B, T, E), the continuation's hidden states after the cache as it was before the eviction; None unless
    ``Request.full_cache``."""


@dataclass
class EvictedContext:
    """A context after its eviction, which an objective can continue with questions about it."""

    ids: Tensor
    """(B, L) int64."""
    lost: Tensor
    """(B, L) float32, 0 to 1: the share of layers and KV heads in which a token's pair was evicted."""
    continued: Callable[[Tensor], Tensor]
    """Maps a continuation (B, T) after the evicted cache to its hidden states (B, T, E), differentiably; may be called
    any number of times."""


class Eviction(Protocol):
    """A way to compute the continuation's hidden states under eviction: ``RealEviction`` or ``KVDropout``."""

    @property
    def press(self) -> BasePress | None:
        """The press that selects; None if the selection is random."""

    def check(self, context_tokens: int, request: Request = NOTHING) -> None:
        """Raise ``ValueError`` if contexts of ``context_tokens`` tokens cannot be evicted or ``request`` not be met."""

    def later_evictions(
        self, context_tokens: int, continuation_tokens: int, turn_ends: Sequence[int] = ()
    ) -> Sequence[int]:
        """Return after how many tokens, the context's included, it evicts again while a continuation is read.

        ``turn_ends`` are the tokens of the continuation after which a turn ends.
        """

    def __call__(
        self,
        model: PreTrainedModel,
        context_ids: Tensor,
        continuation_ids: Tensor,
        *,
        compression_ratio: float,
        step: int,
        request: Request = NOTHING,
        turn_ends: Sequence[int] = (),
    ) -> Evicted:
        """Run context (B, L) and continuation (B, T), evicting between the two and at ``later_evictions``.

        ``compression_ratio`` is the removed share, 0 <= r < 1; ``step`` seeds every draw; ``request`` names the
        results wanted besides hidden states; ``turn_ends`` are those of ``later_evictions``, equal in all rows.
        """
        ...
