"""Facts of kinds that training never asks for, told in the middle of sentences."""

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar

from data.facts import Split
from data.question_kind import Wordings
from data.told_facts import ToldFacts, Values, told_kinds, value_lists
from data.told_wordings import FRAMES
from data.unseen_wordings import TERMS, UNSEEN_CLAUSES, UNSEEN_VALUES


def _any_of(values: list[str]) -> Values:
    return lambda rng, _split: rng.choice(values)


UNSEEN_KINDS = told_kinds(
    UNSEEN_CLAUSES, {name: _any_of(values) for name, values in value_lists(UNSEEN_VALUES).items()}
)


class UnseenFacts(ToldFacts):
    """A trade, a colour, a spot, a reason, a definition, a line of code or a date in words; held out, never trained.

    Parameters
    ----------
    only
        One kind's name; null draws one of all.
    """

    name: ClassVar[str] = "unseen"
    frames: ClassVar[Mapping[Split, Sequence[str]]] = {"held_out": FRAMES["held_out"]}
    wordings: ClassVar[Wordings] = {
        "held_out": tuple(clause.asking for kind in UNSEEN_KINDS.values() for clause in kind.clauses["held_out"])
    }

    def __init__(self, only: str | None = None) -> None:
        super().__init__(UNSEEN_KINDS if only is None else {only: UNSEEN_KINDS[only]})

    def more_fields(self, rng: random.Random) -> dict[str, str]:
        """Draw the term of a definition."""
        return {"term": rng.choice(TERMS)}
