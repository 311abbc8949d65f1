"""An answer's text while its tokens arrive: cut at a stop string, passed on in pieces that no later token changes."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of an unfinished character are decoded to."""


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return ``text`` up to the first stop string, and whether there was one."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """Return the strings that end an answer as a list; a single one may be given as it is.

    Raises ``ValueError`` for an empty one, which stands at the beginning of every answer.
    """
    strings = [stop] if isinstance(stop, str) else list(stop)
    if "" in strings:
        raise ValueError("a stop string is empty, which would end every answer at once: leave it out")
    return strings


class AnswerText(BaseStreamer):
    """Decode an answer token by token; also a streamer for transformers' ``generate``, whose prompt it skips.

    Parameters
    ----------
    decode
        Turns token ids into text, without special tokens; white space around the whole answer is left out.
    stop
        Strings that end the answer and are no part of it, see ``stop_strings``.
    on_text
        Called with each new piece of text; the pieces joined are the answer. None passes nothing on.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: str | Sequence[str] = (),
        on_text: Callable[[str], object] | None = None,
    ) -> None:
        self.decode, self.stop, self.on_text = decode, stop_strings(stop), on_text
        self.shown = ""
        self._ids: list[int] | None = None
        """The answer's tokens from ``generate``; None until its prompt has passed."""

    def reached(self, ids: list[int]) -> bool:
        """Take the answer's tokens so far; return whether a stop string ended it."""
        text, stopped = cut(self.decode(ids), self.stop)
        if not stopped:  # the last characters may still become a stop string or another character
            text = text.rstrip(BROKEN)
            text = text[: len(text) - max((_begun(one, text) for one in self.stop), default=0)].rstrip()
        self._show(text.strip() if stopped else text.lstrip())
        return stopped

    def finish(self, ids: list[int]) -> str:
        """Take all of the answer's tokens; return its text."""
        text = cut(self.decode(ids), self.stop)[0].strip()
        self._show(text)
        return text

    def put(self, value: Tensor) -> None:
        """Take what ``generate`` streams: first the prompt, then one token at a time."""
        if self._ids is None:
            self._ids = []
        else:
            self._ids += value.flatten().tolist()
            self.reached(self._ids)

    def end(self) -> None:
        """Pass the rest on."""
        self.finish(self._ids or [])
        self._ids = None

    def _show(self, text: str) -> None:
        if self.on_text is not None and text.startswith(self.shown) and text != self.shown:
            self.on_text(text[len(self.shown) :])
            self.shown = text


def _begun(stop: str, text: str) -> int:
    """Return how many of a stop string's first characters end ``text``, at most."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
