"""Evaluation tasks that ask held-out questions of one kind, also of kinds that training never asks."""

import random

from data.asked_context import AskedContext, NothingToAsk, asked_context
from data.cases import Case, CaseTask, Frame
from data.distractors import Distractors
from data.fact_task import ANSWER_SLACK
from data.needle_placement import checked_depth
from data.packing import Tokens
from data.question_kind import QuestionKind
from data.question_kinds import QUESTION_KINDS
from data.unseen_facts import UNSEEN_KINDS, UnseenFacts
from sparsekv_pl.models.batch import CaseInfo
from sparsekv_pl.models.chat_frame import QUESTION_OPENING

STRETCHES = 64
"""Stretches of text that are tried for one question."""
QUERY_TOKENS = 128
"""Most tokens of a question that the press sees; others are drawn again."""
ASKED_KINDS: dict[str, QuestionKind] = {
    **{name: kind for name, kind in QUESTION_KINDS.items() if name != "facts"},
    "distractors_8": Distractors((8, 8), one=True),
    "unseen": UnseenFacts(),
    **{f"unseen_{name}": UnseenFacts(name) for name in UNSEEN_KINDS},
}
"""By the task's name. The facts of data/facts.py have a task of their own, data.fact_task.Facts."""


def asked_info(frame: Frame, task: str, asked: AskedContext, depth: float) -> CaseInfo:
    """Describe a case with one question."""
    [turn] = asked.turns
    return CaseInfo(
        id="",
        task=task,
        answers=turn.answers,
        max_new_tokens=len(frame.encode(f" {turn.answer}")) + ANSWER_SLACK,
        depth=depth,
        document_ids=tuple(asked.document_ids),
    )


class QuestionTask(CaseTask):
    """One question per case about the split's text, in its wordings.

    Parameters
    ----------
    kind
        "quotes", "cloze", "neighbours", "order", "speakers", "told", "distractors", "copying", "counting", "list" or
        "variables": kinds that training can ask too, in other words (see data/question_kinds.py). "distractors_8": one
        of eight nearly equal keys. "unseen": facts of kinds that training never asks for, one of the seven drawn for
        each case; "unseen_trade", "unseen_colour", "unseen_spot", "unseen_reason", "unseen_definition",
        "unseen_code_line" and "unseen_day" ask for one of them. It is the task's name.
    """

    def __init__(self, kind: str) -> None:
        if kind not in ASKED_KINDS:
            raise ValueError(f"kind is {kind!r}: give one of {', '.join(ASKED_KINDS)}")
        self.name, self.kind = kind, ASKED_KINDS[kind]

    def case(
        self,
        frame: Frame,
        haystack: Tokens,
        length: int,
        depth: float | None,
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        """See ``CaseTask.case``. What is asked for is at the place nearest to the depth that a question can be about.

        Also raises ``ValueError`` if no stretch of the haystack has anything to ask for, for example a line of
        dialogue.
        """
        if frame.split not in self.kind.wordings:
            raise ValueError(f"task {self.name} has no wordings of the split {frame.split}: leave it out")
        depth, room = checked_depth(depth, rng), length - len(frame.prefix_ids)
        spare = QUERY_TOKENS if query_aware else 0
        for _ in range(STRETCHES):
            try:
                asked = asked_context(frame, haystack, room, [self.kind], rng, frame.split, depth, spare)
            except NothingToAsk:
                continue
            [turn], ids = asked.turns, asked.ids
            question = f"{QUESTION_OPENING}{turn.question}"
            if query_aware:
                end = room - len(frame.encode(question))
                if end < room - spare:
                    continue
                cut = frame.before_character(ids, end)
                ids = [*ids[:cut], *[frame.line_end] * (end - cut)]
            info = asked_info(frame, self.name, asked, depth)
            return frame.build(ids, question, turn.answer_prefix, info, query_aware)
        raise ValueError(
            f"task {self.name} found nothing to ask in {STRETCHES} stretches of the text at a length of {length} "
            "tokens: give longer contexts, or a text that has what it asks for (dialogue for speakers)"
        )
