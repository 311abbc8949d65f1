"""One sentence over and over: for those who compare with evaluations that hide needles in it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from data.text import Document, TextSource

DOCUMENT_CHARACTERS = 10_000


@dataclass
class RepeatedText(TextSource):
    """A sentence repeated in documents of 10,000 characters and more, each one sentence longer than the one before:
    a document's split follows from its text, and so every split has its share of them.

    Text without content is easy to read past and easy to evict: figures are not those of real text.

    Parameters
    ----------
    characters
        How many there are in all documents together, at least; whole sentences.
    sentence
        What is repeated, with a space between.
    """

    characters: int = 1_000_000
    sentence: str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

    def __post_init__(self) -> None:
        if not self.sentence.strip():
            raise ValueError(f"sentence is {self.sentence!r}: give some words to repeat")
        if self.characters < 1:
            raise ValueError(f"characters is {self.characters}: give at least 1")

    def documents(self) -> Iterator[Document]:
        """repeated/0, repeated/1, ..."""
        repeats = -(-DOCUMENT_CHARACTERS // (len(self.sentence) + 1))
        given = 0
        for number in itertools.count():
            if given >= self.characters:
                return
            text = " ".join([self.sentence] * (repeats + number))
            given += len(text)
            yield Document(f"repeated/{number}", text)
