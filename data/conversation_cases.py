"""Training cases of several turns: every answer is supervised where it stands in the conversation."""

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from data.cases import Frame, TrainingCase
from data.conversation import TOLD, Script, transcript
from data.fact_questions import FactQuestions
from data.facts import Split
from data.packing import Tokens
from sparsekv_pl.models.seeding import random_for

TASK = "conversation"
"""The task of such rows."""
TRIED = 16
"""Conversations that are drawn to check that turns have room."""


def checked_turns(turns: tuple[int, int] | None, questions: Mapping[str, float], others: Mapping[str, object]) -> None:
    """Raise ``ValueError`` for ``turns`` that are no range from 2 on, or do not go with ``questions`` or ``others``."""
    if turns is None:
        return
    if not 2 <= turns[0] <= turns[1]:
        raise ValueError(
            f"turns is {turns}: give (fewest, most) with 2 <= fewest <= most, or null for single questions"
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} is {value} and turns is {turns}: set one of them to null")
    for name in questions:
        if name not in TOLD:
            raise ValueError(f"questions has {name!r}: with turns, facts are told, give weights of {', '.join(TOLD)}")


class ConversationCases:
    """A maker of conversations; case ``i`` is a pure function of (seed, split, i), its turns' lengths and its text.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer, with or without a chat template.
    kinds
        Weights of the kinds of facts by name; empty for the facts of data/facts.py alone.
    seed, split
        Seed of the cases; split of the wordings and names.
    """

    def __init__(self, tokenizer: Any, kinds: Mapping[str, float], seed: int = 0, split: Split = "train") -> None:
        self.frame, self.kinds = Frame(tokenizer), dict(kinds) or {FactQuestions.name: 1.0}
        self.seed, self.split = seed, split

    def case(
        self, index: int, text: Tokens, lengths: Sequence[int], told_in: tuple[int, ...] | None = None
    ) -> TrainingCase:
        """Make case ``index`` with turns of these ``lengths``: the first is the context, the others are read after it.

        ``told_in`` are the turns that tell the last question's fact, counted from 0; None draws them.
        """
        made = transcript(
            self._script(random_for("conversation", self.seed, self.split, index), lengths, told_in),
            text,
            self.split == "train",
        )
        first, *ends = accumulate(lengths)
        return TrainingCase(
            made.ids[:first],
            made.ids[first:],
            made.labels[first:],
            made.document_ids,
            TASK,
            turn_ends=tuple(end - first for end in ends),
        )

    def check_room(self, lengths: Sequence[int]) -> None:
        """Raise ``ValueError`` if turns of these ``lengths`` have no room for a fact and a question."""
        for index in range(TRIED):
            self._script(random_for("conversation room", self.seed, self.split, index), lengths, None)

    def _script(self, rng: random.Random, lengths: Sequence[int], told_in: tuple[int, ...] | None) -> Script:
        script = Script(self.frame, lengths, self.kinds, rng, self.split)
        script.draw(told_in)
        return script
