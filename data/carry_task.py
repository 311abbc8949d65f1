"""Evaluation tasks that carry facts over many tokens that are read or written after the context."""

import random
from collections.abc import Callable
from dataclasses import replace

from data.asked_context import AskedContext, NothingToAsk, asked_context
from data.assignments import Assignments
from data.cases import Case, CaseTask, Frame
from data.copying import Copying
from data.counting import Counting
from data.fact_questions import FactQuestions
from data.listed_items import ListedItems
from data.needle_placement import checked_depth
from data.packing import Tokens
from data.question_kind import QuestionKind
from data.question_task import STRETCHES, asked_info
from sparsekv_pl.models.chat_frame import QUESTION_OPENING
from sparsekv_pl.models.seeding import random_for

MADE: dict[str, Callable[[int], QuestionKind]] = {
    "copying": Copying.writing,
    "counting": Counting.writing,
    "list": ListedItems.writing,
    "variables": Assignments.writing,
    "facts": lambda _tokens: FactQuestions(),
}
WRITTEN = {"copying": 0.25, "counting": 0.5, "list": 0.125, "variables": 0.0, "facts": 0.0}
"""Share of a case's tokens that is written; the rest is read."""
SETTLES = 4
"""Times that a question is asked again of a text whose length follows from the question's."""


class Carry(CaseTask):
    """One held-out question about a text of which only the beginning is the context; the rest is read after it.

    With ``Setting.decoding`` all that is read and written after the context is evicted from as it comes. ``length`` is
    the context's; the text goes on behind it, and what is asked for stands anywhere. The task is called "copying-250".

    Parameters
    ----------
    kind
        "copying", "counting", "list", "variables" or "facts".
    tokens
        About so many tokens come after the context: text, question and answer. Half of them are written in counting, a
        quarter in copying (longer stretches of prose alone are rare), an eighth in lists (at most 20 items); values of
        variables and facts are short.
    """

    def __init__(self, kind: str, tokens: int) -> None:
        if kind not in MADE:
            raise ValueError(f"kind is {kind!r}: give one of {', '.join(MADE)}")
        if tokens < 64:
            raise ValueError(f"tokens is {tokens}: give at least 64")
        self.kind, self.tokens, self.written = MADE[kind](int(tokens * WRITTEN[kind])), tokens, WRITTEN[kind]
        self.name = f"{kind}-{tokens}"

    def tokens_needed(self, frame: Frame, length: int) -> int:  # noqa: ARG002
        """Return the tokens of the context and of the text behind it."""
        return length + self.tokens

    def case(
        self,
        frame: Frame,
        haystack: Tokens,
        length: int,
        depth: float | None,
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        """See ``CaseTask.case``; also raises ``ValueError`` if no stretch of the haystack has anything to copy."""
        if query_aware:
            raise ValueError(f"task {self.name} reads its question after the text: set query_aware to false")
        depth = checked_depth(depth, rng)
        for _ in range(STRETCHES):
            try:
                asked = self._asked(frame, haystack, length, depth, rng.getrandbits(64))
            except NothingToAsk:
                continue
            [turn] = asked.turns
            info = asked_info(frame, self.name, asked, depth)
            case = frame.build(asked.ids, f"{QUESTION_OPENING}{turn.question}", turn.answer_prefix, info)
            read = [*case.context_ids[length:], *case.continuation_ids]
            return replace(case, context_ids=case.context_ids[:length], continuation_ids=read)
        raise ValueError(f"task {self.name} found nothing to ask in {STRETCHES} stretches of the text: give more text")

    def _asked(self, frame: Frame, haystack: Tokens, length: int, depth: float, seed: int) -> AskedContext:
        """Ask about a text that, with the question, is as long as wanted: the question is the same for every length."""
        read = length + self.tokens - round(self.tokens * self.written)
        room = read - len(frame.prefix_ids) - 32
        for _ in range(SETTLES):
            asked = asked_context(frame, haystack, room, [self.kind], random_for("carried", seed), frame.split, depth)
            [turn] = asked.turns
            question = f"{QUESTION_OPENING}{turn.question}{frame.question_suffix}{turn.answer_prefix}"
            settled = read - len(frame.prefix_ids) - len(frame.encode(question))
            if settled == room:
                break
            room = settled
        return asked
