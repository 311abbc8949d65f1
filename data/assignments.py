"""Questions for a value that goes from name to name along a chain."""

import random
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

from data.facts import Split, part
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

VALUES = range(1_000, 10_000)
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


class Assigned(NamedTuple):
    """Sentences that give a first value and a later one, and how the last name's value is asked for."""

    first: str
    later: str
    asking: Asking


FORMS: Mapping[Split, tuple[Assigned, ...]] = {
    "train": (
        Assigned(
            " The box {name} holds {value}.",
            " The box {name} holds whatever the box {before} holds.",
            Asking("What does the box {name} hold?", "It holds"),
        ),
        Assigned(
            " {name} costs {value} coins.",
            " {name} costs as much as {before}.",
            Asking("How many coins does {name} cost?", "The price is"),
        ),
        Assigned(
            " Let {name} be {value}.", " Let {name} be the same as {before}.", Asking("What is {name}?", "It equals")
        ),
    ),
    "validation": (
        Assigned(
            " Set {name} to {value}.", " Set {name} to {before}.", Asking("To what is {name} set?", "It is set to")
        ),
    ),
    "held_out": (
        Assigned(
            " The variable {name} gets {value}.",
            " The variable {name} gets the value of {before}.",
            Asking("Which value does the variable {name} have?", "Its value is"),
        ),
    ),
}


class Assignments(QuestionKind):
    """The value of the last name of a chain of assignments; another chain with another value stands between.

    Parameters
    ----------
    hops
        Fewest and most assignments after a chain's first.
    """

    name: ClassVar[str] = "variables"
    inserts = True
    wordings: ClassVar[Wordings] = {split: tuple(form.asking for form in forms) for split, forms in FORMS.items()}

    def __init__(self, hops: tuple[int, int] = (1, 3)) -> None:
        self.hops = hops

    @classmethod
    def writing(cls, tokens: int) -> Self:  # noqa: ARG003
        """Ask for the value after three hops; its answer is short, whatever ``tokens`` is."""
        return cls((3, 3))

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked:  # noqa: ARG002
        """See ``QuestionKind.ask``."""
        form, count = rng.choice(FORMS[split]), 1 + rng.randint(*self.hops)
        names = _names(rng, split, 2 * count)
        chains = names[:count], names[count:]
        values = rng.sample(part(VALUES, split), 2)
        stated = [_stated(form, chain, value) for chain, value in zip(chains, values, strict=True)]
        order = rng.sample([0, 1] * count, 2 * count)
        merged = tuple(stated[which].pop(0) for which in order)
        return Asked(form.asking.turn([str(values[0])], ".", name=chains[0][-1]), merged, tuple(names))


def _names(rng: random.Random, split: Split, count: int) -> list[str]:
    syllables, names = part(SYLLABLES, split), dict[str, None]()
    while len(names) < count:
        names["".join(rng.choices(syllables, k=3)).title()] = None
    return list(names)


def _stated(form: Assigned, names: list[str], value: int) -> list[str]:
    later = zip(names[1:], names, strict=False)
    return [
        form.first.format(name=names[0], value=value),
        *(form.later.format(name=name, before=before) for name, before in later),
    ]
