"""This project's needles as an evaluation task: facts in kinds, names and wordings that training never sees."""

import random

from data.cases import Case, CaseTask, Frame
from data.facts import draw_facts
from data.needle_placement import checked_depth, hide, stretch
from data.needles import filler_room, needle_ids
from data.packing import Tokens
from sparsekv_pl.models.batch import CaseInfo
from sparsekv_pl.models.chat_frame import QUESTION_OPENING

ANSWER_SLACK = 4
"""Tokens that an answer may have beyond its value's, for a full stop or another tokenisation of the value."""


class Facts(CaseTask):
    """Facts of data/facts.py in the wordings of the split, hidden in text; the question asks for the first one.

    In half of the cases all facts are of one kind, which is harder. The task is called "facts", with several needles
    "facts-2" and so on.

    Parameters
    ----------
    needles
        Number of facts hidden in every case, at least 1. The asked one is at the case's depth, the others anywhere.
    """

    def __init__(self, needles: int = 1) -> None:
        if needles < 1:
            raise ValueError(f"needles is {needles}: hide at least 1")
        self.needles = needles
        self.name = "facts" if needles == 1 else f"facts-{needles}"

    def case(
        self,
        frame: Frame,
        haystack: Tokens,
        length: int,
        depth: float | None,
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        """See ``CaseTask.case``; also raises ``ValueError`` if not all needles fit."""
        depth = checked_depth(depth, rng)
        facts = draw_facts(rng, frame.split, self.needles)
        asked = facts[0]
        question = f"{QUESTION_OPENING}{asked.question}"
        needles = [needle_ids(frame, fact) for fact in facts]
        room = filler_room(frame.room(length, question, query_aware), needles, length)
        filler = stretch(frame, haystack, room, rng)
        places = [round(depth * room), *(rng.randint(0, room) for _ in needles[1:])]
        info = CaseInfo(
            id="",
            task=self.name,
            answers=(asked.value,),
            max_new_tokens=len(frame.encode(f" {asked.value}")) + ANSWER_SLACK,
            depth=depth,
            document_ids=tuple(filler.document_ids),
        )
        return frame.build(hide(frame, filler.ids, needles, places), question, asked.answer_prefix, info, query_aware)
