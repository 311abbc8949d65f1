"""The evaluation task of several turns: one held-out question at the end of a conversation."""

import random
from itertools import accumulate

from data.cases import Case, CaseTask, Frame
from data.conversation import TOLD, Script, transcript
from data.fact_task import ANSWER_SLACK
from data.needle_placement import checked_depth
from data.packing import Tokens
from sparsekv_pl.models.batch import CaseInfo, CaseTurns


class Conversation(CaseTask):
    """A conversation of ``turns`` turns of equal length, of which the last asks; others may ask for other facts.

    ``length`` is the context's, which is the first turn, and that of every later turn. With ``decoding: {interval:
    turn}`` all turns are evicted from as they end. The depth chooses the turn that tells the fact last: 0 is the first
    possible, 1 the one before the question. The task is called "turns-4" or "turns-4-corrected".

    Parameters
    ----------
    turns
        Number of turns, at least 2.
    corrected
        Tell the fact first with another value, in a turn before; takes at least 3 turns. The record then says whether
        the outdated value was the answer.
    """

    has_turns = True

    def __init__(self, turns: int, corrected: bool = False) -> None:
        least = 3 if corrected else 2
        if turns < least:
            raise ValueError(f"turns is {turns}: give at least {least}{' with corrected' if corrected else ''}")
        self.turns, self.corrected = turns, corrected
        self.name = f"turns-{turns}{'-corrected' if corrected else ''}"

    def tokens_needed(self, frame: Frame, length: int) -> int:  # noqa: ARG002
        """Return the tokens of all turns."""
        return length * self.turns

    def case(
        self,
        frame: Frame,
        haystack: Tokens,
        length: int,
        depth: float | None,
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        """See ``CaseTask.case``; also raises ``ValueError`` if a turn has no room for a fact and a question."""
        if query_aware:
            raise ValueError(f"task {self.name} asks in turns that no press sees before: set query_aware to false")
        depth = checked_depth(depth, rng)
        first = int(self.corrected)
        told = first + round(depth * (self.turns - 2 - first))
        before = (rng.randrange(told),) if self.corrected else ()
        lengths = [length] * self.turns
        script = Script(frame, lengths, dict.fromkeys(TOLD, 1.0), rng, frame.split, answered=False)
        script.draw((*before, told))
        made = transcript(script, haystack)
        asked = made.exchanges[self.turns - 1]
        text = str(frame.tokenizer.decode(made.ids[len(frame.prefix_ids) :], skip_special_tokens=True))
        spoken, question, _ = text.rpartition(asked.turn.question)
        info = CaseInfo(
            id="",
            task=self.name,
            answers=asked.turn.answers,
            context=f"{spoken}{question}" or text,
            question=asked.turn.question,
            answer_prefix=asked.turn.answer_prefix,
            max_new_tokens=len(frame.encode(f" {asked.turn.answer}")) + ANSWER_SLACK,
            depth=depth,
            document_ids=tuple(made.document_ids),
            turns=CaseTurns(tuple(accumulate(lengths[1:-1])), self.turns - 1 - told, asked.outdated),
        )
        return Case(made.ids[:length], made.ids[length:], info)
