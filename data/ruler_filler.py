"""The filler between RULER's needles: real text, one repeated sentence, or more needles; always of an exact length."""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from data.cases import Frame
from data.needle_placement import stretch, word_starts
from data.packing import Tokens

Haystack = Literal["text", "noise", "needles"]

AFTER_CONTEXT = "\n"
"""Separator between the context and the question in every template."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Filler:
    """Tokens, and the sorted places where needles can be inserted without splitting a word or a line."""

    ids: list[int]
    places: Sequence[int]
    document_ids: tuple[str, ...] = field(default=())

    def near(self, place: int) -> int:
        """Return the first such place from ``place`` on, or else the last one."""
        found = bisect_left(self.places, place)
        return self.places[min(found, len(self.places) - 1)]


def text_filler(frame: Frame, haystack: Tokens, count: int, at: int, rng: random.Random) -> Filler:
    """Draw ``count`` tokens of real text so that a word begins after ``at`` of them."""
    text = stretch(frame, haystack, count, rng, at)
    starts = [place for place, begins in enumerate(word_starts(frame, text.ids)) if begins]
    return Filler(text.ids, sorted({*starts, at}), tuple(text.document_ids))


def line_filler(line: Callable[[], list[int]], count: int, at: int) -> Filler:
    """Make ``count`` tokens of lines so that a line begins after ``at`` of them; the first and the last may be cut."""
    before = _lines(line, at)
    surplus = sum(map(len, before)) - at
    ids: list[int] = []
    places = {at}
    for drawn in [*before, *_lines(line, count - at)]:
        if surplus <= len(ids) < surplus + count:
            places.add(len(ids) - surplus)
        ids += drawn
    return Filler(ids[surplus : surplus + count], sorted(places))


def _lines(line: Callable[[], list[int]], count: int) -> list[list[int]]:
    """Return the fewest lines that have ``count`` tokens."""
    lines: list[list[int]] = []
    total = 0
    while total < count:
        drawn = line()
        lines.append(drawn)
        total += len(drawn)
    return lines


def encode_statement(frame: Frame, statement: str, haystack: Haystack) -> list[int]:
    """Encode a needle between words, or as its own line."""
    return frame.encode(f" {statement}" if haystack == "text" else f"{statement}\n")


def plain_filler(
    frame: Frame, haystack: Tokens, kind: Literal["text", "noise"], count: int, at: int, rng: random.Random
) -> Filler:
    """Make ``count`` tokens of filler from the haystack, or of RULER's noise."""
    if kind == "text":
        return text_filler(frame, haystack, count, at, rng)
    noise = frame.encode(f"{NOISE}\n")
    return line_filler(lambda: noise, count, at)


def filler_tokens(where: str, room: int, parts: Iterable[list[int]]) -> int:
    """Return the tokens left for filler in ``room`` after ``parts``; ``ValueError`` naming ``where`` if none are."""
    count = room - sum(map(len, parts))
    if count < 1:
        raise ValueError(
            f"{where} has no room for filler beside its instructions and needles: give at least {1 - count} more, "
            f"better {65 - count}"
        )
    return count
