"""When a press evicts what is read or written after the context, and how much stays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsekv_pl.eviction.limits import check_evicts_again
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.presses.traits import PressTraits


@dataclass(frozen=True)
class Decoding:
    """Eviction every ``interval`` tokens after the context, read and written ones alike, or after every turn.

    The cache then never holds more than what the last eviction left and the pairs of an interval or turn.

    Parameters
    ----------
    interval
        Tokens between two evictions, counted from the context's end; more than the press's window. "turn": the context
        is a conversation's first turn, and every later turn is evicted from when its answer is over, before the next
        question is known. What has no turns (plain text, single questions) is evicted from after the context alone.
    budget
        Most KV pairs per head that each of these evictions leaves, in tokens. Null: as many as the compression ratio
        leaves of the context. A smaller ``RealEviction.budget`` holds here too.
    grows
        The compression ratio holds for all tokens read so far (kvpress's CompressionRatioDecodingPress), so the cache
        grows with the text, at most to ``budget``.
    context
        Evict from the context too, as without ``Decoding`` (kvpress's PrefillDecodingPress). False keeps all of it
        until the first interval is over (kvpress's DecodingPress).

    Raises
    ------
    ValueError
        If ``interval`` or ``budget`` is below 1.
    """

    interval: int | Literal["turn"]
    budget: int | None = None
    grows: bool = False
    context: bool = True

    def __post_init__(self) -> None:
        for name in ("interval", "budget"):
            value = getattr(self, name)
            if value is not None and value != "turn" and value < 1:
                raise ValueError(f"decoding.{name}={value} must be at least 1 token")

    def check(self, traits: PressTraits, request: Request = NOTHING, training: bool = False) -> None:
        """Raise ``ValueError`` if a press of these traits cannot evict in this way, or ``request`` not be met."""
        if traits.foresees:
            raise ValueError(
                f"{traits.name} sees the whole continuation, so it cannot evict while that is read: leave decoding out"
            )
        again = f"again and again{' in training' if training else ''}"
        check_evicts_again(traits, request, not training, again, "Leave decoding out")
        if self.interval != "turn" and self.interval <= traits.window:
            raise ValueError(
                f"decoding.interval={self.interval} must be above the window of {traits.name}, {traits.window} tokens: "
                "make it longer, or give the press a smaller window_size (n_sink)"
            )
        if request.layers:
            raise ValueError(
                "an objective over layers compares the outputs of one forward, and with decoding the continuation runs "
                "in several: leave decoding or that objective out"
            )

    @property
    def label(self) -> str:
        """How reports name it: "decoding, every 16 to 128"."""
        evicts = "prefill and decoding" if self.context else "decoding"
        size = "" if self.budget is None else f" to {self.budget}"
        return f"{evicts}, every {self.interval}{size}{', growing' if self.grows else ''}"

    @property
    def by_turn(self) -> bool:
        """Whether it evicts at the ends of turns, which the data gives."""
        return self.interval == "turn"

    def ends(self, context_tokens: int, tokens: int, turn_ends: Sequence[int] = ()) -> list[int]:
        """Return after how many tokens, the context's included, it evicts in ``tokens`` tokens after the context.

        ``turn_ends`` are the tokens after the context at which a turn ends.
        """
        found = turn_ends if self.interval == "turn" else range(self.interval, tokens + 1, self.interval)
        return [context_tokens + end for end in found if end <= tokens]

    def evictions(self, context_tokens: int, continuation_tokens: int, turn_ends: Sequence[int] = ()) -> list[int]:
        """Return the ``ends`` in a continuation that is read; nothing is evicted after its last token."""
        return self.ends(context_tokens, continuation_tokens - 1, turn_ends)

    def pairs(self, context_tokens: int, compression_ratio: float, at_most: int | None) -> int | None:
        """Return the most KV pairs per head that each later eviction leaves; None if only the ratio decides.

        ``at_most`` is the budget of the context's eviction, which goes on to hold.
        """
        own = self.budget
        if own is None and not self.grows:
            own = max(1, int(context_tokens * (1 - compression_ratio)))
        return min((pairs for pairs in (own, at_most) if pairs is not None), default=None)


def check_turns(decodings: Iterable[Decoding | None], has_turns: bool, setting: str) -> None:
    """Raise ``ValueError`` if one of ``decodings`` evicts after turns and the data, by its ``setting``, has none."""
    if not has_turns and any(decoding is not None and decoding.by_turn for decoding in decodings):
        raise ValueError(
            f"decoding.interval=turn evicts after the turns of a conversation, and data.{setting} makes none: have it "
            "make some (data.conversation_task.Conversation in tasks, turns in training), or give interval a number"
        )
