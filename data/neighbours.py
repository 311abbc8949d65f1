"""Questions for what stands before or after a quoted sentence or phrase."""

import random
from collections.abc import Mapping
from typing import ClassVar

from data.facts import Split
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

PHRASE_WORDS = (4, 7)
LONGEST_QUOTE = 16
"""Most words of a quoted sentence."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
SENTENCE_BEGINNING = 5
"""Words asked of the neighbouring sentence."""

Sided = Mapping[Split, Mapping[bool, tuple[Asking, ...]]]
"""Wordings by split, and by whether the answer comes after the quote."""
PHRASES: Sided = {
    "train": {
        True: (
            Asking('Which {number} words come after "{quote}"?', "After it come"),
            Asking('Name the {number} words right after "{quote}".', "Right after it:"),
            Asking('"{quote}" - what are the following {number} words?', "The following words are"),
        ),
        False: (
            Asking('Which {number} words come before "{quote}"?', "Before it come"),
            Asking('Name the {number} words right before "{quote}".', "Right before it:"),
            Asking('"{quote}" - what are the preceding {number} words?', "The preceding words are"),
        ),
    },
    "validation": {
        True: (Asking('By which {number} words is "{quote}" followed?', "It is followed by"),),
        False: (Asking('By which {number} words is "{quote}" preceded?', "It is preceded by"),),
    },
    "held_out": {
        True: (Asking('The document has "{quote}". And then, in {number} words?', "And then"),),
        False: (Asking('The document has "{quote}". And just earlier, in {number} words?', "Just earlier"),),
    },
}
SENTENCES: Sided = {
    "train": {
        True: (
            Asking('How does the sentence after "{quote}" begin?', "The sentence after it begins"),
            Asking('What does the text say next, after "{quote}"?', "Next it says:"),
        ),
        False: (
            Asking('How does the sentence before "{quote}" begin?', "The sentence before it begins"),
            Asking('What did the text say last, before "{quote}"?', "Last it said:"),
        ),
    },
    "validation": {
        True: (Asking('Begin the sentence that succeeds "{quote}"', "The succeeding sentence is"),),
        False: (Asking('Begin the sentence that precedes "{quote}"', "The preceding sentence is"),),
    },
    "held_out": {
        True: (Asking('Behind "{quote}" the document has another sentence. Its start?', "It starts"),),
        False: (Asking('Ahead of "{quote}" the document has another sentence. Its start?', "It starts with"),),
    },
}


class Neighbours(QuestionKind):
    """The words before or after a phrase, or the beginning of the sentence before or after one; the quote occurs once.

    The numbers of words are smaller than those of ``Quotes``.
    """

    name: ClassVar[str] = "neighbours"
    wordings: ClassVar[Wordings] = {
        split: tuple(asking for sides in (PHRASES, SENTENCES) for side in sides[split].values() for asking in side)
        for split in PHRASES
    }

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked | None:
        """See ``QuestionKind.ask``."""
        after = rng.random() < 0.5
        if rng.random() < 0.5:
            asked = self._sentence(passage, rng, rng.choice(SENTENCES[split][after]), depth, after)
            if asked is not None:
                return asked
        return self._phrase(passage, rng, rng.choice(PHRASES[split][after]), depth, after)

    def _phrase(
        self, passage: Passage, rng: random.Random, wording: Asking, depth: float | None, after: bool
    ) -> Asked | None:
        quoted, answered = rng.randint(*PHRASE_WORDS), rng.choice(list(NUMBERS))
        for span in passage.candidates(passage.windows(quoted + answered), rng, depth):
            cut = quoted if after else answered
            quote, answer = (span[:cut], span[cut:]) if after else (span[cut:], span[:cut])
            if passage.readable(span) and passage.once(quote):
                passage.use(span)
                number = NUMBERS[answered]
                return Asked(wording.turn([passage.text(answer)], "", quote=passage.text(quote), number=number))
        return None

    def _sentence(
        self, passage: Passage, rng: random.Random, wording: Asking, depth: float | None, after: bool
    ) -> Asked | None:
        pairs = {
            range(one.start, other.stop): (one, other) if after else (other, one)
            for one, other in zip(passage.sentences, passage.sentences[1:], strict=False)
            if one.stop == other.start and other.start not in passage.paragraphs
        }
        for pair in passage.candidates(list(pairs), rng, depth):
            quote, answer = pairs[pair]
            if len(quote) <= LONGEST_QUOTE and passage.once(quote):
                passage.use(pair)
                beginning = passage.text(answer[:SENTENCE_BEGINNING])
                return Asked(wording.turn([beginning], "", quote=passage.text(quote)))
        return None
