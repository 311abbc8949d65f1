"""Needle cases of training: facts hidden in real text at exact token depths, with questions after the eviction."""

import random
from dataclasses import dataclass
from typing import Any, Literal

from data.cases import Frame, TrainingCase
from data.facts import Fact, Split, draw_facts
from data.needle_placement import checked_depth, hide, stretch
from data.packing import Tokens
from data.question_kind import Turn
from data.question_turns import asked_and_answered
from sparsekv_pl.models.chat_frame import next_turn
from sparsekv_pl.models.seeding import random_for

QUESTION_FIRST_SHARE = 0.1
MIN_FILLER_SHARE = 0.5


@dataclass(frozen=True)
class NeedleCase(TrainingCase):
    """A training case with the asked fact and its place."""

    fact: Fact
    depth: float
    """Fraction of the filler before the asked needle."""
    position: int
    """Filler tokens before the asked needle."""


class NeedleTask:
    """A maker of needle cases; case ``i`` is a pure function of (seed, split, i) and of its text.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer. With a chat template, the context is the beginning of the user's message up to the
        question, cut as in kvpress's pipeline; without one, it begins with the bos token if there is one.
    context_tokens
        Length of contexts in tokens, including chat prefix and needles.
    seed
        Seed of the cases.
    split
        Split of the wordings and names.
    needles
        Least and most facts hidden in a case; fewer if the filler would be less than half of the context. With
        ask="one", and a range that starts at 1, a third of the cases hide more than one.
    supervise
        "value": labels only on the value's tokens, for exact match. "value_and_stop": also on the full stop.
    ask
        "one": ask for the first fact. "all": ask for each fact in its own turn, which gives more supervision per
        context, the most expensive part.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_tokens: int,
        seed: int = 0,
        split: Split = "train",
        needles: tuple[int, int] = (1, 1),
        supervise: Literal["value", "value_and_stop"] = "value",
        ask: Literal["one", "all"] = "one",
    ) -> None:
        if context_tokens < 1:
            raise ValueError(f"context_tokens is {context_tokens}: give at least 1")
        if not 1 <= needles[0] <= needles[1]:
            raise ValueError(f"needles is {needles}: give (least, most) with 1 <= least <= most")
        self.frame, self.next_turn = Frame(tokenizer), next_turn(tokenizer)
        self.context_tokens, self.seed, self.split = context_tokens, seed, split
        self.needles, self.supervise, self.ask = needles, supervise, ask

    def case(
        self, index: int, text: Tokens, depth: float | None = None, context_tokens: int | None = None
    ) -> NeedleCase:
        """Hide the facts of case ``index`` in a stretch of ``text`` that begins at a random word.

        ``depth`` in [0, 1] puts the asked needle after round(depth * filler) filler tokens; None draws it.
        ``context_tokens`` is this case's length; None takes the task's.

        Raises
        ------
        ValueError
            If the text is empty or shorter than the filler, or the needle does not fit.
        """
        length = self.context_tokens if context_tokens is None else context_tokens
        rng = self._rng(index)
        facts, prefix_ids = self._facts_and_prefix(rng)
        needles = self._fit(facts, len(prefix_ids), length)
        filler = stretch(self.frame, text, length - len(prefix_ids) - sum(map(len, needles)), rng)
        depth = checked_depth(depth, rng)
        position = self.frame.behind_character(filler.ids, round(depth * len(filler.ids)))
        places = [position, *(rng.randint(0, len(filler.ids)) for _ in needles[1:])]
        continuation, labels = self._continuation(facts[: len(needles)] if self.ask == "all" else facts[:1])
        return NeedleCase(
            prefix_ids + hide(self.frame, filler.ids, needles, places),
            continuation,
            labels,
            filler.document_ids,
            "needle",
            facts[0],
            depth,
            position,
        )

    def most_beside_text(self, cases: int) -> int:
        """Return the most tokens that prefix and asked needle take in the first ``cases`` cases, without text."""
        beside = 0
        for index in range(cases):
            facts, prefix_ids = self._facts_and_prefix(self._rng(index))
            beside = max(beside, len(prefix_ids) + len(needle_ids(self.frame, facts[0])))
        return beside

    def _rng(self, index: int) -> random.Random:
        return random_for("needle", self.seed, self.split, index)

    def _facts_and_prefix(self, rng: random.Random) -> tuple[list[Fact], list[int]]:
        facts = draw_facts(rng, self.split, self._count(rng))
        prefix = self.frame.prefix
        if self.split == "train" and rng.random() < QUESTION_FIRST_SHARE:
            prefix = prefix + facts[0].question + "\n\n"
        return facts, self.frame.start(prefix)

    def _count(self, rng: random.Random) -> int:
        least, most = self.needles
        if self.ask == "all":
            return rng.randint(least, most)
        if least == most or (least == 1 and rng.random() >= 1 / 3):
            return least
        return rng.randint(max(least, 2), most)

    def _fit(self, facts: list[Fact], used: int, length: int) -> list[list[int]]:
        """Encode the needles that fit into ``length`` tokens of which ``used`` are taken; the asked one must fit."""
        asked, *others = (needle_ids(self.frame, fact) for fact in facts)
        room = filler_room(length - used, [asked], length)
        kept = [asked]
        for needle in others:
            room -= len(needle)
            if room >= MIN_FILLER_SHARE * length:
                kept.append(needle)
        return kept

    def _continuation(self, facts: list[Fact]) -> tuple[list[int], list[int]]:
        turns = [Turn(fact.question, fact.answer_prefix, (fact.value,)) for fact in facts]
        return asked_and_answered(self.frame, self.next_turn, turns, self.supervise == "value_and_stop")


def needle_ids(frame: Frame, fact: Fact) -> list[int]:
    """Encode a fact on its own line."""
    return frame.encode(f"\n{fact.statement}\n")


def filler_room(room: int, needles: list[list[int]], length: int) -> int:
    """Return the number of filler tokens beside the needles in ``room`` tokens of a ``length``-token context.

    Raises ``ValueError`` if there are none: a needle without text around it is not hidden.
    """
    used = sum(map(len, needles))
    if room <= used:
        least = length - room + used + 1
        raise ValueError(
            f"{len(needles)} needle(s) of {used} tokens beside {length - room} tokens of prefix and question leave no "
            f"room for text in a context of {length} tokens: give at least {least}, better {least + 63}"
        )
    return room - used
