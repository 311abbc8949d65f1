"""Documents, how they are read in blocks, and which of them cannot be used."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

BOM = "\ufeff"
"""What some editors put before a text: it is not part of it."""
LONGEST = 100_000_000
"""Characters of a document, far above any book: more is a broken file, and would take the tokenizer's memory."""


class SourceFailed(ValueError):
    """The text cannot be read on. The run stops; its checkpoint goes on from the same document."""


class Document(NamedTuple):
    """A text with the name that records and messages call it by."""

    id: str
    text: str


class DocumentBlocks(ABC):
    """Reads the documents of one worker block by block; the reader's state is exact between two blocks."""

    skipped: int = 0
    """Documents that could not be used so far, those of every epoch; part of the state."""

    @abstractmethod
    def next(self) -> list[Document] | None:
        """The next block (it may be empty), or None at the end of the epoch, after which reading starts
        again.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TextSource(ABC):
    """A place that documents come from."""

    skipped: int = 0
    """Documents that could not be used in the last reading of ``documents``."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents once, in the source's order."""

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> DocumentBlocks:
        """The share ``number`` of ``total`` of the documents whose text ``keep`` accepts; in memory, as one
        block. Share 0 counts what the source skipped.
        """
        kept = [document for document in self.documents() if keep(document.text)]
        return InMemory(kept[number::total], self.skipped if number == 0 else 0)


class InMemory(DocumentBlocks):
    """Documents that are held, as one block an epoch, with the number that was skipped to get them."""

    def __init__(self, documents: list[Document], skipped: int) -> None:
        self.documents, self.unusable = documents, skipped
        self.read = False

    def next(self) -> list[Document] | None:
        """All documents, then None."""
        self.read = not self.read
        self.skipped += self.unusable if self.read else 0
        return self.documents if self.read else None

    def state_dict(self) -> dict[str, Any]:
        """Whether they were read in this epoch, and the count."""
        return {"read": self.read, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.read, self.skipped = state["read"], state["skipped"]


def fault(text: Any) -> str | None:
    """Why a text cannot be used, None when it can."""
    if text is None:
        return "it has no text"
    if isinstance(text, bytes):
        return "its text is not UTF-8"
    if not isinstance(text, str):
        return f"its text is of type {type(text).__name__}, not a string"
    if not text.removeprefix(BOM).strip():
        return "its text is empty"
    if "\0" in text:
        return "its text has NUL characters"
    if len(text) > LONGEST:
        return f"its text has {len(text):,} characters, more than {LONGEST:,}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "its text has lone surrogates, which no encoding can hold"
    return None


class Skipped:
    """Counts the documents of a source that cannot be used, and warns of the first.

    SourceFailed when more than ``limit`` come one after the other: then it is the source that is wrong.
    """

    def __init__(self, source: str, limit: int, count: int = 0, in_a_row: int = 0) -> None:
        self.source, self.limit, self.count, self.in_a_row = source, limit, count, in_a_row

    def usable(self, document_id: str, text: Any) -> bool:
        """Whether to use a document; one that is not is counted."""
        why = fault(text)
        if why is None:
            self.in_a_row = 0
        else:
            self.skip(document_id, why)
        return why is None

    def skip(self, document_id: str, why: str) -> None:
        """Count a document."""
        if self.count == 0:
            log.warning("%s: skipped %s: %s. Others are counted, not named", self.source, document_id, why)
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        if self.in_a_row > self.limit:
            raise SourceFailed(
                f"{self.source}: {self.in_a_row} documents in a row cannot be used, the last is {document_id}: {why}. "
                "Check text_field and the source, or raise skip_limit"
            )
