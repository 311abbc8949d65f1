"""Questions for the order in which two phrases stand."""

import random
from typing import ClassVar

from data.facts import Split
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

PHRASE_WORDS = (5, 9)
APART = 24
"""Least words from the first phrase's beginning to the second's."""
LABELS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (("A", "B"), ("1", "2"), ("X", "Y")),
    "validation": (("P", "Q"),),
    "held_out": (("K", "L"),),
}


class EventOrder(QuestionKind):
    """Which of two quoted phrases stands first; both occur once. The answer is a phrase's label."""

    name: ClassVar[str] = "order"
    wordings: ClassVar[Wordings] = {
        "train": (
            Asking('Which stands first in the text?\n{a}: "{one}"\n{b}: "{other}"', "First stands"),
            Asking("Which comes earlier, {a} or {b}?\n({a}) {one}\n({b}) {other}", "Earlier comes"),
            Asking("{a}: {one}\n{b}: {other}\nWhich of them is said before the other?", "Said before the other is"),
            Asking('In the order of the text, is "{one}" ({a}) or "{other}" ({b}) the first?', "The first is"),
        ),
        "validation": (
            Asking('Put in order: {a} "{one}", {b} "{other}". Which one leads?', "The one that leads is"),
            Asking("What did you read sooner? {a}: {one} {b}: {other}", "Sooner I read"),
        ),
        "held_out": (
            Asking('One of these two opens, the other follows. {a} = "{one}", {b} = "{other}"', "It opens with"),
            Asking('Does the document reach "{one}" ({a}) or "{other}" ({b}) first?', "It reaches"),
        ),
    }

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked | None:
        """See ``QuestionKind.ask``; ``depth`` is the place of one of the two phrases."""
        first = self._phrase(passage, rng, depth, None)
        second = first and self._phrase(passage, rng, None, first)
        if first is None or second is None:
            return None
        passage.use(first, second)
        labels = rng.choice(LABELS[split])
        shown = rng.sample([first, second], 2)
        answer = labels[shown.index(min(shown, key=lambda span: span.start))]
        one, other = map(passage.text, shown)
        wording = rng.choice(self.wordings[split])
        return Asked(wording.turn([answer], ".", one=one, other=other, a=labels[0], b=labels[1]))

    def _phrase(self, passage: Passage, rng: random.Random, depth: float | None, besides: range | None) -> range | None:
        """Choose a phrase that occurs once, far enough from the one that it is compared with."""
        for span in passage.candidates(passage.windows(rng.randint(*PHRASE_WORDS)), rng, depth):
            far = besides is None or abs(span.start - besides.start) >= APART
            if far and passage.readable(span) and passage.once(span):
                return span
        return None
