"""Questions that ask to count on, from a start and by a step that the text tells."""

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from data.facts import Split, draw_name, part
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

STARTS, STEPS = range(10, 200), range(2, 22)
TOKENS_PER_NUMBER = 5
"""Digits, comma and space."""
TOLD: Mapping[Split, Sequence[str]] = {
    "train": (
        " {who} counts from {start} in steps of {step}.",
        " When {who} counts, it starts at {start} and goes up by {step}.",
    ),
    "validation": (" The numbers of {who} begin with {start}, each {step} larger than the last.",),
    "held_out": (" {who} keeps a tally that opens at {start} and grows by {step}.",),
}


class Counting(QuestionKind):
    """The numbers that somebody counts: start, step and the last number must be carried while they are written.

    Parameters
    ----------
    numbers
        Fewest and most numbers of an answer.
    """

    name: ClassVar[str] = "counting"
    inserts = True
    wordings: ClassVar[Wordings] = {
        "train": (
            Asking("Count as {who} does, {number} numbers.", "Counted:"),
            Asking("Which {number} numbers does {who} count?", "The numbers counted are"),
        ),
        "validation": (Asking("Write {number} numbers in the way of {who}.", "In that way:"),),
        "held_out": (Asking("Give the tally of {who}, {number} entries.", "The entries are"),),
    }

    def __init__(self, numbers: tuple[int, int] = (6, 24)) -> None:
        self.numbers = numbers

    @classmethod
    def writing(cls, tokens: int) -> Self:
        """Ask for answers of about ``tokens`` tokens."""
        numbers = max(2, tokens // TOKENS_PER_NUMBER)
        return cls((numbers, numbers))

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked:  # noqa: ARG002
        """See ``QuestionKind.ask``."""
        who, number = draw_name(rng, split), rng.randint(*self.numbers)
        start, step = rng.choice(part(STARTS, split)), rng.choice(part(STEPS, split))
        counted = ", ".join(str(start + place * step) for place in range(number))
        told = rng.choice(TOLD[split]).format(who=who, start=start, step=step)
        turn = rng.choice(self.wordings[split]).turn([counted], ".", who=who, number=str(number))
        return Asked(turn, (told,), (who,))
