"""Questions that ask for a long copy of the text, word by word."""

import random
from typing import ClassVar, Self

from data.facts import Split
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

QUOTED = 8
"""Words of the quote before the copy."""
WORDS_PER_TOKEN = 0.7
"""Of English prose."""


class Copying(QuestionKind):
    """The words behind a quote, dozens of them: a copy reads on in the text while it is written.

    Parameters
    ----------
    words
        Fewest and most words of a copy.
    """

    name: ClassVar[str] = "copying"
    wordings: ClassVar[Wordings] = {
        "train": (
            Asking('Copy out {number} words from behind "{quote}"', "The copy:"),
            Asking('Write down the {number} words that come after "{quote}" exactly as they stand.', "They stand so:"),
            Asking("{quote} ... Type the next {number} words of the text.", "Typed:"),
        ),
        "validation": (Asking('Transcribe {number} words, beginning right behind "{quote}"', "Transcribed:"),),
        "held_out": (
            Asking('Reproduce the document word for word behind "{quote}", {number} words long.', "Reproduced:"),
        ),
    }

    def __init__(self, words: tuple[int, int] = (16, 64)) -> None:
        self.words = words

    @classmethod
    def writing(cls, tokens: int) -> Self:
        """Ask for answers of about ``tokens`` tokens."""
        words = max(1, round(tokens * WORDS_PER_TOKEN))
        return cls((words, words))

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked | None:
        """See ``QuestionKind.ask``."""
        number = rng.randint(*self.words)
        for span in passage.candidates(passage.windows(QUOTED + number), rng, depth):
            quote, copy = span[:QUOTED], span[QUOTED:]
            if passage.readable(span) and passage.once(quote):
                passage.use(span)
                wording = rng.choice(self.wordings[split])
                return Asked(wording.turn([passage.text(copy)], "", quote=passage.text(quote), number=str(number)))
        return None
