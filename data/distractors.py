"""Several keys to tell apart, several values of one key, and several keys in one question."""

import random
from typing import ClassVar

from data.facts import Split, part
from data.names import ADJECTIVES, FACILITIES, LAST_NAMES
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

KEYS, VALUES, ASKED = (3, 4), (2, 3), 2
"""Fewest and most keys of a case, values of a key that has several, and keys of a question that has several."""
COUNTS = {2: "two", 3: "three"}
NUMBERED: dict[Split, tuple[str, ...]] = {
    "train": ("locker", "gate", "box", "room"),
    "validation": ("shelf",),
    "held_out": ("cabin", "drawer"),
}
STATEMENTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "The number for {key} is {value}.",
        "For {key}, dial {value}.",
        "At {key} they ask for {value}.",
        "{value} is what opens {key}.",
        "Somebody had written {value} next to {key}.",
        "In the list, {key} stands beside {value}.",
    ),
    "validation": ("Registered for {key}: {value}.", "On file, {key} goes with {value}."),
    "held_out": ("Among the entries, {key} has {value}.", "{value} was put down for {key}."),
}
ONE: dict[Split, tuple[Asking, ...]] = {
    "train": (
        Asking("Which number is for {key}?", "For {key} it is"),
        Asking("Only {key}: what is its number?", "Its number is"),
        Asking("Tell {key} from the others. Its number?", "The number is"),
    ),
    "validation": (Asking("Which number goes with {key}?", "With {key} goes"),),
    "held_out": (Asking("What does the document put down for {key}?", "For {key} the document has"),),
}
SEVERAL_VALUES: dict[Split, tuple[Asking, ...]] = {
    "train": (
        Asking("Which {count} numbers are for {key}?", "For {key} they are"),
        Asking("List all {count} numbers of {key} in the order of the text.", "In order, they are"),
    ),
    "validation": (Asking("Which {count} numbers go with {key}?", "With {key} go"),),
    "held_out": (Asking("What {count} entries does the document have for {key}?", "The entries are"),),
}
SEVERAL_KEYS: dict[Split, tuple[Asking, ...]] = {
    "train": (
        Asking("Give the numbers of {key}.", "They are"),
        Asking("What are the numbers of {key}, one after the other?", "One after the other:"),
    ),
    "validation": (Asking("Which numbers go with {key}, in this order?", "In this order:"),),
    "held_out": (Asking("What does the document put down for each of {key}?", "It puts down"),),
}


class Distractors(QuestionKind):
    """Keys that are nearly equal, with numbers that look alike, all in one wording.

    A question asks for the number of one key, for all numbers of a key that has several, or for the numbers of several
    keys, as RULER's niah_multikey, niah_multivalue and niah_multiquery do in other words.
    """

    name: ClassVar[str] = "distractors"
    inserts = True
    wordings: ClassVar[Wordings] = {split: (*ONE[split], *SEVERAL_VALUES[split], *SEVERAL_KEYS[split]) for split in ONE}

    def __init__(self, keys: tuple[int, int] = KEYS, one: bool = False) -> None:
        self.keys, self.one = keys, one

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked:  # noqa: ARG002
        """See ``QuestionKind.ask``."""
        keys = _keys(rng, split, self.keys)
        numbers = _numbers(rng, len(keys) + VALUES[1])
        told = [(key, numbers.pop()) for key in keys]
        form = ONE if self.one else rng.choice((ONE, SEVERAL_VALUES, SEVERAL_KEYS))
        asked = keys[: ASKED if form is SEVERAL_KEYS else 1]
        if form is SEVERAL_VALUES:
            told += [(keys[0], numbers.pop()) for _ in range(rng.randint(*VALUES) - 1)]
        rng.shuffle(told)
        answers = [number for key in asked for other, number in told if other == key]
        statement = rng.choice(STATEMENTS[split])
        hidden = [f" {_sentence(statement.format(key=key, value=number))}" for key, number in told]
        wording = rng.choice(form[split])
        turn = wording.turn(answers, ".", key=" and ".join(asked), count=COUNTS.get(len(answers), ""))
        return Asked(turn, tuple(hidden), tuple(keys))


def _keys(rng: random.Random, split: Split, counts: tuple[int, int]) -> list[str]:
    """Draw different keys that share most of their letters, in random order."""
    count, form = rng.randint(*counts), rng.randrange(3)
    if count > KEYS[1] and form == 1:  # a split has too few kinds of buildings
        form = rng.choice((0, 2))
    if form == 0:
        noun, numbers = rng.choice(NUMBERED[split]), _numbers(rng, count, digits=3)
        return [f"{noun} {number}" for number in numbers]
    if form == 1:
        adjective, nouns = rng.choice(part(ADJECTIVES, split)), part(FACILITIES, split)
        return [f"the {adjective} {noun}" for noun in rng.sample(nouns, min(count, len(nouns)))]
    name, initials = rng.choice(part(LAST_NAMES, split)), rng.sample("ABCDEFGHJKLMNPRSTVW", count)
    return [f"{initial}. {name}" for initial in initials]


def _numbers(rng: random.Random, count: int, digits: int = 5) -> list[str]:
    """Draw different numbers: each differs from the first one in one digit."""
    first = [str(rng.randrange(10 ** (digits - 1), 10**digits))]
    while len(first) < count:
        place, digit = rng.randrange(digits), str(rng.randrange(1, 10))
        number = first[0][:place] + digit + first[0][place + 1 :]
        if number not in first:
            first.append(number)
    rng.shuffle(first)
    return first


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
