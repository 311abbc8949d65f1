"""The kinds of questions that training can ask, and their weights."""

from collections.abc import Mapping
from typing import Any

from data.assignments import Assignments
from data.cloze import Cloze
from data.copying import Copying
from data.counting import Counting
from data.distractors import Distractors
from data.event_order import EventOrder
from data.fact_questions import FactQuestions
from data.listed_items import ListedItems
from data.neighbours import Neighbours
from data.question_kind import QuestionKind
from data.quotes import Quotes
from data.speakers import Speakers
from data.told_facts import ToldFacts

QUESTION_KINDS: dict[str, QuestionKind] = {
    kind.name: kind
    for kind in (
        FactQuestions(),
        ToldFacts(),
        Distractors(),
        Quotes(),
        Cloze(),
        Neighbours(),
        EventOrder(),
        Speakers(),
        Copying(),
        Counting(),
        ListedItems(),
        Assignments(),
    )
}


LARGEST_WEIGHT = 1e6


def checked_weights(weights: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the weights above 0 in the order of ``QUESTION_KINDS``; empty for facts alone, the default.

    Raises ``ValueError`` for an unknown kind, a weight that is no number from 0 to ``LARGEST_WEIGHT``, or none above 0.
    """
    if weights is None:
        return {}
    for name, weight in weights.items():
        if name not in QUESTION_KINDS:
            raise ValueError(f"questions has {name!r}: give weights of {', '.join(QUESTION_KINDS)}")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"questions.{name} is {weight!r}: give a weight from 0 to {LARGEST_WEIGHT:,.0f}")
    found = {name: float(weights[name]) for name in QUESTION_KINDS if weights.get(name, 0) > 0}
    if not found:
        raise ValueError("questions has no weight above 0: weight a kind, or give null for facts alone")
    return {} if list(found) == [FactQuestions.name] else found
