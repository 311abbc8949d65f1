"""One repeated sentence, for comparison with evaluations that hide needles in such text."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from data.text import Document, TextSource

DOCUMENT_CHARACTERS = 10_000


@dataclass
class RepeatedText(TextSource):
    """A sentence repeated in documents of at least 10,000 characters, each one sentence longer than the one before.

    The lengths differ because a document's split follows from its text, so that every split gets documents. Text
    without content is easy to ignore and to evict: results differ from those on real text.

    Parameters
    ----------
    characters
        Least number of characters in all documents together; sentences are whole.
    sentence
        The sentence, repeated with a space between.
    """

    characters: int = 1_000_000
    sentence: str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

    def __post_init__(self) -> None:
        if not self.sentence.strip():
            raise ValueError(f"sentence is {self.sentence!r}: give some words to repeat")
        if self.characters < 1:
            raise ValueError(f"characters is {self.characters}: give at least 1")

    def documents(self) -> Iterator[Document]:
        """Yield the documents, with ids repeated/0, repeated/1, ..."""
        repeats = -(-DOCUMENT_CHARACTERS // (len(self.sentence) + 1))
        given = 0
        for number in itertools.count():
            if given >= self.characters:
                return
            text = " ".join([self.sentence] * (repeats + number))
            given += len(text)
            yield Document(f"repeated/{number}", text)
