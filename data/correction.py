"""Facts that are corrected: told with one value, and later with another, which is the one to remember."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from data.facts import Split
from data.question_kind import Asked

CORRECTIONS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Correction: {told}",
        "I was wrong earlier. {told}",
        "Scratch what I said before: {told}",
        "This has changed in the meantime. {told}",
        "Please update your notes. {told}",
        "New information has come in: {told}",
        "What I wrote above no longer holds. {told}",
        "Sorry, I mixed something up. {told}",
    ),
    "validation": ("I have to take one thing back. {told}",),
    "held_out": (
        "An erratum to my earlier message: {told}",
        "Forget the value from before, it is out of date. {told}",
        "As of today something else is true: {told}",
    ),
}
"""Wordings of a sentence that replaces an earlier one. No string is in two splits."""
OTHER_VALUES = 32
"""Draws of another value."""


@dataclass(frozen=True)
class Correction:
    """A fact that was corrected: ``asked.hidden`` has the sentence with the outdated value, then the correction."""

    asked: Asked
    outdated: str


def corrected(asked: Asked, other_value: Callable[[], str], rng: random.Random, split: Split) -> Correction | None:
    """Let ``asked``, which hides one sentence with its one answer, be the correction of a sentence with another value.

    Return None if the sentence does not have its value exactly once, or no other value is to be had.
    """
    [sentence], [value] = asked.hidden, asked.turn.answers
    for _ in range(OTHER_VALUES):
        outdated = other_value()
        first = _with_value(sentence, value, outdated)
        if outdated.lower() not in f"{sentence} {asked.turn.answer_prefix}".lower() and value not in outdated:
            break
    else:
        return None
    if first is None:
        return None
    told = sentence.strip()
    again = sentence.replace(told, rng.choice(CORRECTIONS[split]).format(told=told))
    return Correction(replace(asked, hidden=(first, again)), outdated)


def _with_value(sentence: str, value: str, other: str) -> str | None:
    found = list(re.finditer(re.escape(value), sentence, re.IGNORECASE))
    if len(found) != 1:
        return None
    start, stop = found[0].span()
    if sentence[start].isupper() and value[0].islower():
        other = other[0].upper() + other[1:]
    return sentence[:start] + other + sentence[stop:]
