"""Training cases with questions of several kinds about one context."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.asked_context import AskedContext, NothingToAsk, asked_context
from data.cases import Frame, TrainingCase
from data.facts import Split
from data.needles import MIN_FILLER_SHARE, QUESTION_FIRST_SHARE
from data.packing import Tokens
from data.passage import Passage
from data.question_kinds import QUESTION_KINDS
from data.question_turns import asked_and_answered
from sparsekv_pl.models.chat_frame import QUESTION_OPENING, next_turn
from sparsekv_pl.models.seeding import random_for

QUESTION_FIRST_ROOM = 96
"""Tokens that may go to a question in front of the text; nothing is asked about the text they replace."""


@dataclass(frozen=True)
class QuestionCase(TrainingCase):
    """A training case with the kinds that found nothing to ask."""

    left_out: tuple[str, ...]
    """The kinds that the case would have asked, had the text had something for them."""


class QuestionCases:
    """A maker of cases; case ``i`` is a pure function of (seed, split, i) and of its text.

    The kinds of a case's questions are drawn by weight, each for itself. If the text has nothing for one, the case is
    drawn again without this kind.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer, with or without a chat template.
    context_tokens
        Length of contexts in tokens, including chat prefix and inserted sentences.
    weights
        Weights of kinds by name.
    questions
        Fewest and most questions of a context. There are fewer if the text has no more, or the continuation would be
        longer than ``continuation_tokens``.
    continuation_tokens
        Most tokens of all questions and answers; the first question is always asked.
    seed, split
        Seed of the cases; split of the wordings and names.
    supervise_stop
        Put labels also on the answers' full stops.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_tokens: int,
        weights: Mapping[str, float],
        questions: tuple[int, int],
        continuation_tokens: int,
        seed: int = 0,
        split: Split = "train",
        supervise_stop: bool = True,
    ) -> None:
        self.frame, self.next_turn = Frame(tokenizer), next_turn(tokenizer)
        self.context_tokens, self.continuation_tokens = context_tokens, continuation_tokens
        self.weights, self.questions = dict(weights), questions
        self.seed, self.split, self.supervise_stop = seed, split, supervise_stop

    def case(
        self,
        index: int,
        text: Tokens,
        depth: float | None = None,
        context_tokens: int | None = None,
        first: str | None = None,
    ) -> QuestionCase | None:
        """Make case ``index`` from a stretch of ``text``, or return None if no kind finds anything to ask.

        ``first`` is the kind of the first question; None draws it. ``depth`` is the place of its answer, as a fraction
        of the text.
        """
        length = self.context_tokens if context_tokens is None else context_tokens
        left_out: tuple[str, ...] = ()
        while set(left_out) < set(self.weights):
            rng = random_for("asked", self.seed, self.split, index, len(left_out))
            weights = {name: weight for name, weight in self.weights.items() if name not in left_out}
            names = rng.choices(list(weights), list(weights.values()), k=rng.randint(*self.questions))
            if first in weights:
                names = [first, *names[1:]]
            question_first = self.split == "train" and rng.random() < QUESTION_FIRST_SHARE
            room = length - len(self.frame.prefix_ids)
            spare = QUESTION_FIRST_ROOM if question_first and room >= 2 * QUESTION_FIRST_ROOM else 0
            kinds = [QUESTION_KINDS[name] for name in names]
            try:
                asked = asked_context(self.frame, text, room, kinds, rng, self.split, depth, spare)
            except NothingToAsk as nothing:
                left_out = (*left_out, nothing.kind)
                continue
            return self._case(asked, spare, left_out)
        return None

    def room_needed(self, draws: int) -> tuple[int, str]:
        """Return the tokens that a context needs for every kind, and the kind that needs most, in ``draws`` draws."""
        needed = {}
        for name in self.weights:
            rng, kind = random_for("room", self.seed, name), QUESTION_KINDS[name]
            drawn = [kind.ask(Passage(), rng, self.split) for _ in range(draws)] if kind.inserts else []
            sizes = [sum(len(self.frame.encode(text)) for text in asked.hidden) for asked in drawn if asked]
            needed[name] = len(self.frame.prefix_ids) + int(max(sizes, default=0) / MIN_FILLER_SHARE) + 1
        most = max(needed, key=lambda name: needed[name])
        return needed[most], most

    def _case(self, asked: AskedContext, spare: int, left_out: tuple[str, ...]) -> QuestionCase:
        prefix, ids = self.frame.prefix_ids, asked.ids
        if spare:
            begun = self.frame.start(f"{self.frame.prefix}{asked.turns[0].question}{QUESTION_OPENING}")
            question = len(begun) - len(prefix)
            if question <= spare:
                end = self.frame.before_character(ids, len(ids) - question)
                prefix, ids = begun, [*ids[:end], *[self.frame.line_end] * (len(ids) - question - end)]
        count = len(asked.turns)
        while True:
            continuation, labels = self._continuation(asked, count)
            if count == 1 or len(continuation) <= self.continuation_tokens:
                break
            count -= 1
        task = "+".join(dict.fromkeys(asked.kinds[:count]))
        return QuestionCase([*prefix, *ids], continuation, labels, asked.document_ids, task, left_out)

    def _continuation(self, asked: AskedContext, count: int) -> tuple[list[int], list[int]]:
        return asked_and_answered(self.frame, self.next_turn, asked.turns[:count], self.supervise_stop)
