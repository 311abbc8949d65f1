"""Windows of text from several streams, each window from a stream drawn by weight."""

from collections.abc import Iterator
from typing import Any

from data.packing import Tokens, WindowStream
from sparsekv_pl.models.encoding import Encoder
from sparsekv_pl.models.seeding import random_for


class MixedWindows(Iterator[Tokens]):
    """Windows of weighted streams; the stream of window n is a function of (seed, name, n).

    Parameters
    ----------
    streams
        The streams with their weights.
    seed, name
        Seed of the draws, and the name of this worker's share, which makes workers draw apart.
    """

    def __init__(self, streams: list[tuple[WindowStream, float]], seed: int, name: str) -> None:
        self.streams = [stream for stream, _ in streams]
        self.weights = [weight for _, weight in streams]
        self.seed, self.name = seed, name
        self.taken = 0

    @property
    def encoder(self) -> Encoder:
        """The tokenizer's encoder."""
        return self.streams[0].encoder

    @property
    def skipped(self) -> int:
        """Number of unusable documents so far, in all streams."""
        return sum(stream.skipped for stream in self.streams)

    def __next__(self) -> Tokens:
        draw = random_for("source", self.seed, self.name, self.taken)
        window = next(draw.choices(self.streams, self.weights)[0])
        self.taken += 1
        return window

    def state_dict(self) -> dict[str, Any]:
        """Return the number of windows taken and every stream's state."""
        return {"taken": self.taken, "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.taken = state["taken"]
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(own)
