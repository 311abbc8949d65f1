"""Insertion of needles: the stretch of haystack, the depth, and word and character boundaries."""

import random
from collections.abc import Sequence

from data.cases import Frame
from data.packing import Tokens
from sparsekv_pl.models.chat_frame import WORD_STARTS

REACH = 256
"""Number of tokens within which a word start is searched."""
SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"', "。", "！", "？")  # noqa: RUF001


def checked_depth(depth: float | None, rng: random.Random) -> float:
    """Return ``depth``, or draw one if it is None; ``ValueError`` outside [0, 1]."""
    if depth is None:
        return rng.random()
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}: give a fraction of the filler between 0 and 1")
    return depth


def stretch(frame: Frame, haystack: Tokens, count: int, rng: random.Random, at: int = 0) -> Tokens:
    """Take ``count`` tokens of the haystack from a random place at which tokens 0 and ``at`` both begin a word.

    If there is no such place within ``REACH`` tokens, only token ``at`` begins a word; if there is none either, the
    drawn place is used. No character is cut: a cut character at the end is replaced by line ends. Raises ``ValueError``
    if the haystack is empty or too short.
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
    """Return for each token whether it begins a word; if tokens carry no spaces, whether it does not continue one."""
    tokens = frame.tokenizer.convert_ids_to_tokens(ids)
    starts = [token.startswith(WORD_STARTS) for token in tokens]
    if any(starts):
        return starts
    return [begins and not token.startswith("##") for begins, token in zip(frame.begins(ids), tokens, strict=True)]


def sentence_ends(frame: Frame, ids: list[int]) -> list[int]:
    """Return the places between two sentences; between two words if there are none, else between two characters."""
    tokens = [token.rstrip("".join(WORD_STARTS)) for token in frame.tokenizer.convert_ids_to_tokens(ids)]
    starts = word_starts(frame, ids)
    between = [i for i in range(1, len(ids)) if starts[i]]
    return [i for i in between if tokens[i - 1].endswith(SENTENCE_ENDS)] or between or [0]


def hide(frame: Frame, filler: Sequence[int], needles: Sequence[Sequence[int]], places: Sequence[int]) -> list[int]:
    """Insert ``needles[i]`` after the first ``places[i]`` tokens of ``filler``; at equal places in the given order.

    A place inside a character moves behind it.
    """
    ids: list[int] = []
    done = 0
    moved = [frame.behind_character(filler, place) for place in places]
    for place, needle in sorted(zip(moved, needles, strict=True), key=lambda pair: pair[0]):
        ids += [*filler[done:place], *needle]
        done = place
    return [*ids, *filler[done:]]
