"""Where a needle is inserted: the stretch of haystack, the depth, and the tokens around it."""

import random
from collections.abc import Sequence

from data.cases import Frame
from data.chat import WORD_STARTS
from data.packing import Tokens

REACH = 256
"""How many tokens on a word start is looked for."""


def checked_depth(depth: float | None, rng: random.Random) -> float:
    """``depth``, or a drawn one where it is None; ValueError outside [0, 1]."""
    if depth is None:
        return rng.random()
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}: give a fraction of the filler between 0 and 1")
    return depth


def stretch(frame: Frame, haystack: Tokens, count: int, rng: random.Random, at: int = 0) -> Tokens:
    """``count`` tokens from a random place of the haystack on where tokens 0 and ``at`` both begin a word.

    Where there is no such place within ``REACH`` tokens, ``at`` alone begins one, and where there is none for it either
    the place stays as drawn. No character is cut in two: where none ends at the last token, line ends take the place of
    its part. ValueError when the haystack is empty or too short.
    """
    if not haystack.ids:
        raise ValueError("the haystack is empty: give the task some text to hide facts in")
    last = len(haystack.ids) - count
    if last < 0:
        raise ValueError(
            f"the haystack has {len(haystack.ids)} tokens and {count} are needed: give more text or a shorter context"
        )
    drawn = rng.randint(0, last)
    reach = min(last - drawn + 1, REACH)
    begins = word_starts(frame, haystack.ids[drawn : drawn + reach])
    also = word_starts(frame, haystack.ids[drawn + at : drawn + at + reach]) if at < count else begins
    both = (i for i, pair in enumerate(zip(begins, also, strict=True)) if all(pair))
    start = drawn + next(both, also.index(True) if True in also else 0)
    start = frame.before_character(haystack.ids, start)
    end = frame.before_character(haystack.ids, start + count)
    filler = haystack.slice(start, end)
    filler.ids += [frame.line_end] * (start + count - end)
    return filler


def word_starts(frame: Frame, ids: list[int]) -> list[bool]:
    """Which of the tokens begin a word; all that do not continue one where the tokens carry no spaces."""
    tokens = frame.tokenizer.convert_ids_to_tokens(ids)
    starts = [token.startswith(WORD_STARTS) for token in tokens]
    if any(starts):
        return starts
    return [begins and not token.startswith("##") for begins, token in zip(frame.begins(ids), tokens, strict=True)]


def hide(frame: Frame, filler: Sequence[int], needles: Sequence[Sequence[int]], places: Sequence[int]) -> list[int]:
    """``filler`` with ``needles[i]`` after its first ``places[i]`` tokens, at one place in the order given.

    A place within a character moves behind it.
    """
    ids: list[int] = []
    done = 0
    moved = [frame.behind_character(filler, place) for place in places]
    for place, needle in sorted(zip(moved, needles, strict=True), key=lambda pair: pair[0]):
        ids += [*filler[done:place], *needle]
        done = place
    return [*ids, *filler[done:]]
