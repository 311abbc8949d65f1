"""When a press evicts what is read or written after the context, and how much stays."""

from dataclasses import dataclass

from sparsekv_pl.eviction.limits import evicts_again
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.presses.traits import PressTraits


@dataclass(frozen=True)
class Decoding:
    """Eviction every ``interval`` tokens after the context, read and written ones alike.

    The cache then never holds more than what the last eviction left and ``interval`` pairs.

    Parameters
    ----------
    interval
        Tokens between two evictions, counted from the context's end; more than the press's window.
    budget
        Most KV pairs per head that each of these evictions leaves, in tokens. Null: as many as the compression ratio
        leaves of the context.
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

    interval: int
    budget: int | None = None
    grows: bool = False
    context: bool = True

    def __post_init__(self) -> None:
        for name in ("interval", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"decoding.{name}={value} must be at least 1 token")

    def check(self, traits: PressTraits, request: Request = NOTHING, training: bool = False) -> None:
        """Raise ``ValueError`` if a press of these traits cannot evict in this way, or ``request`` not be met."""
        if traits.foresees:
            raise ValueError(
                f"{traits.name} sees the whole continuation, so it cannot evict while that is read: leave decoding out"
            )
        if not evicts_again(traits, request, decoding=not training):
            raise ValueError(
                f"{traits.name} cannot evict again and again{' in training' if training else ''}: it masks KV pairs "
                "instead of removing them, or looks at the whole context at once. Leave decoding out, or take another "
                "press"
            )
        if self.interval <= traits.window:
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

    def evictions(self, context_tokens: int, continuation_tokens: int) -> range:
        """Return after how many tokens, the context's included, it evicts while a continuation is read.

        Nothing is evicted after the continuation's last token.
        """
        return range(context_tokens + self.interval, context_tokens + continuation_tokens, self.interval)

    def pairs(self, context_tokens: int, compression_ratio: float) -> int | None:
        """Return the most KV pairs per head that each later eviction leaves; None if only the ratio decides."""
        if self.grows:
            return self.budget
        left = max(1, int(context_tokens * (1 - compression_ratio)))
        return left if self.budget is None else self.budget
