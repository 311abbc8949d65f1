"""The interface of every way of evicting, and what one returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.request import NOTHING, Request


@dataclass
class Selection:
    """What one scorer said of the keys of one layer when it selected."""

    layer: int
    press: str
    scores: Tensor
    """(B, K, S), differentiable; higher stays."""
    positions: Tensor | None = None
    """(B, K, S) int64, the context position of each scored key; None means 0..S-1, as in a single prefill."""
    order_only: bool = False
    """The scores are never negative and yet no masses. LagKV's softmax is over statistics that hardly differ, so its
    shares are all alike whatever it was taught."""


@dataclass
class Evicted:
    """The continuation's hidden states under eviction, and what was evicted."""

    hidden: Tensor
    """(B, T, E), the input of the LM head."""
    kept_share: float
    """KV pairs kept / KV pairs of the context, mean over layers and KV heads."""
    selections: list[Selection] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar terms by name that presses ask an objective to add (SparseRegPress)."""
    context: "EvictedContext | None" = None
    """For objectives that ask what was lost; None unless they were requested."""


@dataclass
class EvictedContext:
    """A context after its eviction, to be asked about."""

    ids: Tensor
    """(B, L) int64."""
    lost: Tensor
    """(B, L) float32, 0 to 1: in what share of layers and KV heads a token's pair was evicted."""
    continued: Callable[[Tensor], Tensor]
    """Hidden states (B, T, E) of any continuation (B, T) after what is left, as often as wanted; differentiable."""


class Eviction(Protocol):
    """Hidden states of the supervised tokens under eviction: the one question that real eviction and KV dropout
    answer.
    """

    @property
    def press(self) -> BasePress | None:
        """What selects; None where chance does."""

    def check(self, context_tokens: int, request: Request = NOTHING) -> None:
        """Raise ``ValueError`` where a context of this length cannot be evicted from, or the request not answered."""

    def __call__(
        self,
        model: PreTrainedModel,
        context_ids: Tensor,
        continuation_ids: Tensor,
        *,
        compression_ratio: float,
        step: int,
        request: Request = NOTHING,
    ) -> Evicted:
        """Run context (B, L) and continuation (B, T), evicting between the two.

        ``step`` seeds every draw; ``request`` says what else is to be known.
        """
        ...
