"""Facts told in the middle of sentences, in many grammatical shapes."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from data.correction import Correction, corrected
from data.facts import Split, draw_name, part
from data.names import ADJECTIVES, WORDS
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings
from data.told_wordings import FRAMES, TOLD_CLAUSES, TOLD_VALUES

WHO = "{who} "
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ONES = "one two three four five six seven eight nine".split()
UNITS: dict[Split, tuple[str, ...]] = {
    "train": ("miles", "kilometres", "leagues"),
    "validation": ("yards",),
    "held_out": ("furlongs", "metres"),
}
ENDINGS: dict[Split, tuple[str, ...]] = {
    "train": ("csv", "txt", "json"),
    "validation": ("log",),
    "held_out": ("xml", "dat"),
}

Values = Callable[[random.Random, Split], str]


@dataclass(frozen=True)
class Clause:
    """One way to tell a fact, and its question."""

    text: str
    asking: Asking


@dataclass(frozen=True)
class ToldKind:
    """One kind of told fact: its values and its clauses by split."""

    name: str
    values: Values
    clauses: dict[str, list[Clause]] = field(default_factory=dict)


def told_kinds(clauses: str, values: Mapping[str, Values]) -> dict[str, ToldKind]:
    """Read a table of clauses as in data/told_wordings.py, by the kinds' names."""
    kinds = {}
    for block in clauses.strip().split("\n\n"):
        name, *lines = block.splitlines()
        kind = ToldKind(name, values[name])
        for line in lines:
            split, _, rest = line.partition(": ")
            text, question, answer_prefix = rest.split(" | ")
            kind.clauses.setdefault(split, []).append(Clause(text, Asking(question, answer_prefix)))
        kinds[name] = kind
    return kinds


def value_lists(table: str) -> dict[str, list[str]]:
    """Read a table of values as in data/told_wordings.py, by the kinds' names."""
    lines = table.strip().replace("\n    ", " ").splitlines()
    return {name: values.split(", ") for name, _, values in (line.partition(": ") for line in lines)}


def _of_split(values: Sequence[str]) -> Values:
    return lambda rng, split: rng.choice(part(values, split))


def _count(rng: random.Random, _split: Split) -> str:
    if rng.random() < 0.5:
        return str(rng.randrange(13, 5000))
    return f"{rng.choice(TENS)}-{rng.choice(ONES)}"


def _age(rng: random.Random, _split: Split) -> str:
    return str(rng.randrange(19, 98))


def _distance(rng: random.Random, split: Split) -> str:
    return f"{rng.randrange(3, 400)} {rng.choice(UNITS[split])}"


def _ship(rng: random.Random, split: Split) -> str:
    return f"{rng.choice(part(ADJECTIVES, split))} {rng.choice(part(WORDS, split))}".title()


def _file(rng: random.Random, split: Split) -> str:
    return f"{rng.choice(part(WORDS, split))}_{rng.randrange(100):02d}.{rng.choice(ENDINGS[split])}"


TOLD_KINDS = told_kinds(
    TOLD_CLAUSES,
    {name: _of_split(values) for name, values in value_lists(TOLD_VALUES).items()}
    | {"count": _count, "age": _age, "distance": _distance, "person": draw_name, "ship": _ship, "file": _file},
)


class ToldFacts(QuestionKind):
    """A fact about a person, told in the middle of a sentence; its value has one to four words.

    Parameters
    ----------
    kinds
        The kinds of facts, one of which is drawn for every question.
    """

    name: ClassVar[str] = "told"
    inserts = True
    frames: ClassVar[Mapping[Split, Sequence[str]]] = FRAMES
    wordings: ClassVar[Wordings] = {
        split: tuple(clause.asking for kind in TOLD_KINDS.values() for clause in kind.clauses[split])
        for split in FRAMES
    }

    def __init__(self, kinds: Mapping[str, ToldKind] = TOLD_KINDS) -> None:
        self.kinds = kinds

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked:  # noqa: ARG002
        """See ``QuestionKind.ask``."""
        return self._asked(self._drawn(rng), rng, split)

    def correct(self, rng: random.Random, split: Split) -> Correction:
        """Draw a question about a fact that is told and then corrected."""
        while True:
            kind = self._drawn(rng)
            found = corrected(self._asked(kind, rng, split), partial(kind.values, rng, split), rng, split)
            if found is not None:
                return found

    def _drawn(self, rng: random.Random) -> ToldKind:
        return self.kinds[rng.choice(list(self.kinds))]

    def _asked(self, kind: ToldKind, rng: random.Random, split: Split) -> Asked:
        who, other = draw_name(rng, split), draw_name(rng, split)
        value = kind.values(rng, split)
        while other == who or value in (who, other):
            other, value = draw_name(rng, split), kind.values(rng, split)
        clause = rng.choice(kind.clauses[split])
        fields = {"who": who, "other": other, "value": value} | self.more_fields(rng)
        frames = [frame for frame in self.frames[split] if clause.text.startswith(WHO) or "{rest}" not in frame]
        told = clause.text.format(**fields)
        sentence = rng.choice(frames).format(clause=told, rest=told.removeprefix(f"{who} "), **fields)
        return Asked(clause.asking.turn([value], ".", **fields), (f" {sentence}",), (who,))

    def more_fields(self, rng: random.Random) -> dict[str, str]:  # noqa: ARG002
        """Return fields of clauses besides ``who``, ``other`` and ``value``."""
        return {}
