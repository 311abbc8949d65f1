"""Training's needle cases: facts hidden in real text at exact token depths, asked for after the eviction."""

import random
from dataclasses import dataclass
from typing import Any, Literal

from data.cases import Frame
from data.chat import next_turn
from data.facts import Fact, Split, draw_facts
from data.needle_placement import checked_depth, hide, stretch
from data.packing import Tokens
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.seeding import random_for

QUESTION_FIRST_SHARE = 0.1
MIN_FILLER_SHARE = 0.5
QUESTION_OPENING = "\n\n"
"""Between the text and the first question."""


@dataclass(frozen=True)
class NeedleCase:
    """One row of a batch, before padding. ``position`` counts the filler tokens before the needle that is
    asked for.
    """

    context_ids: list[int]
    continuation_ids: list[int]
    labels: list[int]
    document_ids: list[str]
    fact: Fact
    depth: float
    position: int
    task: str = "needle"


class NeedleTask:
    """Makes needle cases; case ``i`` is a pure function of (seed, split, i) and of the text it is given.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer. With a chat template the context is the beginning of the user's message, up
        to the question, exactly as kvpress's pipeline cuts it; without one it begins with the bos token where
        there is one.
    context_tokens
        Length of contexts, in tokens, chat prefix and needles included.
    needles
        Least and most facts hidden in a case, only while the filler remains at least half of the context. Where
        one is asked for, more than one are hidden in a third of the cases that the range leaves the choice.
    ask
        "one": for the first of the facts. "all": for each in a turn of its own, which teaches far more per
        context, because the context costs most.
    supervise
        "value": labels on the value's tokens alone, for exact match. "value_and_stop": on the full stop too.
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
        ``context_tokens`` is the length of this case alone; None takes the task's.

        Raises ValueError when the text is empty or shorter than the filler, or when the needle does not fit.
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
            facts[0],
            depth,
            position,
        )

    def most_beside_text(self, cases: int) -> int:
        """The most tokens that prefix and asked needle take in cases 0 to ``cases`` - 1; text must fit beside them."""
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
        """Token ids of the needles that fit a context of ``length`` tokens beside ``used``; the asked one must."""
        asked, *others = (needle_ids(self.frame, fact) for fact in facts)
        room = filler_room(length - used, [asked], length)
        kept = [asked]
        for needle in others:
            room -= len(needle)
            if room >= MIN_FILLER_SHARE * length:
                kept.append(needle)
        return kept

    def _continuation(self, facts: list[Fact]) -> tuple[list[int], list[int]]:
        texts: list[str] = []
        for number, fact in enumerate(facts):
            opening = self.next_turn if number else QUESTION_OPENING
            asked = f"{opening}{fact.question}{self.frame.question_suffix}{fact.answer_prefix}"
            texts += [asked, f" {fact.value}", "."]
        supervised = (False, True, self.supervise == "value_and_stop") * len(facts)
        ids: list[int] = []
        labels: list[int] = []
        for part, counts in zip(self.frame.parts(texts), supervised, strict=True):
            ids += part
            labels += part if counts else [IGNORE] * len(part)
        return ids, labels


def needle_ids(frame: Frame, fact: Fact) -> list[int]:
    """Token ids of a fact on a line of its own."""
    return frame.encode(f"\n{fact.statement}\n")


def filler_room(room: int, needles: list[list[int]], length: int) -> int:
    """Tokens of filler that remain beside the needles in ``room`` tokens of a ``length``-token context.

    Raises ValueError when none does: a needle that nothing surrounds is not hidden.
    """
    used = sum(map(len, needles))
    if room <= used:
        least = length - room + used + 1
        raise ValueError(
            f"{len(needles)} needle(s) of {used} tokens beside {length - room} tokens of prefix and question leave no "
            f"room for text in a context of {length} tokens: give at least {least}, better {least + 63}"
        )
    return room - used
