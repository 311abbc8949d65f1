"""Questions for the words that follow a quote."""

import random
from typing import ClassVar

from data.facts import Split
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

QUOTED, FOLLOWING = 12, 8
"""Words of the quote and of the answer."""


class Quotes(QuestionKind):
    """The next eight words after twelve that are quoted from anywhere in the passage, where they occur once."""

    name: ClassVar[str] = "quotes"
    wordings: ClassVar[Wordings] = {
        "train": (
            Asking('Continue the passage from here: "{quote}"', "The passage continues:"),
            Asking('The text says: "{quote}" How does it go on?', "It goes on:"),
            Asking("Copy the words that come next.\n{quote} ...", "..."),
            Asking('What follows "{quote}" in the text above?', "What follows is:"),
            Asking("Complete the quotation: {quote}", "The rest is:"),
            Asking('Find "{quote}" and read on.', "Reading on:"),
        ),
        "validation": (
            Asking('Which words come directly behind "{quote}"?', "Directly behind come:"),
            Asking('Go on quoting: "{quote}"', "The quotation goes on with"),
        ),
        "held_out": (
            Asking('Here is a piece of the document: "{quote}" Give the next words.', "The next words are:"),
            Asking('In the document, after "{quote}", what is written?', "There it is written:"),
        ),
    }

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked | None:
        """See ``QuestionKind.ask``."""
        for span in passage.candidates(passage.windows(QUOTED + FOLLOWING), rng, depth):
            quote, following = span[:QUOTED], span[QUOTED:]
            if passage.readable(span) and passage.once(quote):
                passage.use(span)
                wording = rng.choice(self.wordings[split])
                return Asked(wording.turn([passage.text(following)], "", quote=passage.text(quote)))
        return None
