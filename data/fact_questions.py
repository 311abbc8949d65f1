"""The facts of data/facts.py as a kind of question: each on its own line."""

import random
from functools import partial
from typing import ClassVar

from data.correction import Correction, corrected
from data.facts import KINDS, SPLITS, Fact, Split, draw_fact
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Turn, Wordings
from data.wordings import GENERIC_QUESTIONS, KIND_WORDINGS


class FactQuestions(QuestionKind):
    """An invented attribute of an invented subject, in the wordings of data/wordings.py."""

    name: ClassVar[str] = "facts"
    inserts = True
    wordings: ClassVar[Wordings] = {
        split: (
            *(Asking(*wording) for wording in GENERIC_QUESTIONS[split]),
            *(Asking(own.question, own.answer_prefix) for kind in KIND_WORDINGS[split].values() for own in kind),
        )
        for split in SPLITS
    }

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked:  # noqa: ARG002
        """See ``QuestionKind.ask``."""
        return _asked(draw_fact(rng, split))

    def correct(self, rng: random.Random, split: Split) -> Correction:
        """Draw a question about a fact that is told and then corrected."""
        while True:
            fact = draw_fact(rng, split)
            [kind] = [kind for kind in KINDS if kind.name == fact.kind]
            found = corrected(_asked(fact), partial(kind.value, rng, split), rng, split)
            if found is not None:
                return found


def _asked(fact: Fact) -> Asked:
    turn = Turn(fact.question, fact.answer_prefix, (fact.value,))
    return Asked(turn, (f"\n{fact.statement}\n",), (fact.subject,))
