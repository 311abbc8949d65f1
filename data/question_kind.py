"""The interface of a kind of question, and what it makes: a question with its answer, and sentences to insert."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from data.facts import Split
from data.passage import Passage


@dataclass(frozen=True)
class Turn:
    """One question and its answer: ``answer_prefix`` + " " + ``answer`` + ``stop``."""

    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    """The expected answers, in the order in which training gives them."""
    stop: str = "."

    @property
    def answer(self) -> str:
        """The answers as one text: "a", "a and b" or "a, b and c"."""
        *others, last = self.answers
        return f"{', '.join(others)} and {last}" if others else last


class Asking(NamedTuple):
    """The template of a question, and of its answer's beginning."""

    question: str
    answer_prefix: str

    def turn(self, answers: Sequence[str], stop: str, **fields: str) -> Turn:
        """Fill in the fields."""
        return Turn(self.question.format(**fields), self.answer_prefix.format(**fields), tuple(answers), stop)


Wordings = Mapping[Split, Sequence[Asking]]
"""Wordings by split."""


@dataclass(frozen=True)
class Asked:
    """A question, and the sentences that it needs in the context."""

    turn: Turn
    hidden: tuple[str, ...] = ()
    """Sentences to insert, in this order, with the space or line ends around them."""
    names: tuple[str, ...] = ()
    """Subjects of the inserted sentences; no other question of the context may have one of them."""


class QuestionKind(ABC):
    """A kind of question, about the text itself or about sentences inserted into it.

    A question can be answered from the context alone, and has one answer. Wordings, names and values are those of a
    split.
    """

    name: ClassVar[str]
    inserts: ClassVar[bool] = False
    """Whether it inserts sentences. It is then given an empty passage."""
    wordings: ClassVar[Wordings]
    """The question's wordings by split; no string is in two splits."""

    @abstractmethod
    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked | None:
        """Draw a question, or return None if the passage has nothing for it.

        ``depth`` in [0, 1] chooses the place in the passage that is nearest to this share of its words; None draws it.
        """
