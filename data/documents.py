"""Documents, their sources, reading in blocks, and the check for unusable documents."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sparsekv_pl.storage.given_paths import existing

log = logging.getLogger(__name__)

BOM = "\ufeff"
"""The byte order mark that some editors write before a text; it is removed."""
LONGEST = 100_000_000
"""Most characters of a document, far above any book: longer ones are broken files and would exhaust memory."""


class SourceFailed(ValueError):
    """The source cannot be read any further. The run stops; its checkpoint resumes at the same document."""


class Document(NamedTuple):
    """A text with its id in records and messages."""

    id: str
    text: str


class DocumentBlocks(ABC):
    """A reader of one worker's documents, block by block; its state is exact between two blocks."""

    skipped: int = 0
    """Number of unusable documents so far, over all epochs; part of the state."""

    @abstractmethod
    def next(self) -> list[Document] | None:
        """Return the next block (may be empty), or None at the end of the epoch, after which reading starts again."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TextSource(ABC):
    """A source of documents."""

    skipped: int = 0
    """Number of unusable documents in the last reading of ``documents``."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield all documents once, in the source's order."""

    def parts(self) -> "list[tuple[TextSource, float]]":
        """Return the sources that this one mixes, with their shares of the tokens: itself, unless it mixes others."""
        return [(self, 1.0)]

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> DocumentBlocks:
        """Return share ``number`` of ``total`` of the documents whose text ``keep`` accepts, in memory, as one block.

        Share 0 counts the documents that the source skipped.
        """
        kept = [document for document in self.documents() if keep(document.text)]
        return InMemory(kept[number::total], self.skipped if number == 0 else 0)


class InMemory(DocumentBlocks):
    """Documents in memory, as one block per epoch, with the number of skipped ones."""

    def __init__(self, documents: list[Document], skipped: int) -> None:
        self.documents, self.unusable = documents, skipped
        self.read = False

    def next(self) -> list[Document] | None:
        """Return all documents, then None."""
        self.read = not self.read
        self.skipped += self.unusable if self.read else 0
        return self.documents if self.read else None

    def state_dict(self) -> dict[str, Any]:
        """Return whether the documents were read in this epoch, and the number of skipped ones."""
        return {"read": self.read, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.read, self.skipped = state["read"], state["skipped"]


def fault(text: Any) -> str | None:
    """Return why a text cannot be used; None if it can."""
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
    """Counter of a source's unusable documents; warns of the first.

    Raises ``SourceFailed`` after more than ``limit`` of them in a row, which points to a wrong source.
    """

    def __init__(self, source: str, limit: int) -> None:
        self.source, self.limit = source, limit
        self.count = self.in_a_row = 0
        self.first = ""
        """The first unusable document, and why it is."""

    def usable(self, document_id: str, text: Any) -> bool:
        """Return whether a document can be used; count it if not."""
        why = fault(text)
        if why is None:
            self.in_a_row = 0
        else:
            self.skip(document_id, why)
        return why is None

    def skip(self, document_id: str, why: str) -> None:
        """Count an unusable document, and warn of the first; ``why`` is the reason."""
        if self.count == 0:
            self.first = f"{document_id}: {why}" if document_id != self.source else why
            log.warning("%s: skipped %s: %s. Others are counted, not named", self.source, document_id, why)
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        if self.in_a_row > self.limit:
            raise SourceFailed(
                f"{self.source}: {self.in_a_row} documents in a row cannot be used, the last is {document_id}: {why}. "
                "Check text_field and the source, or raise skip_limit"
            )


def check_files(owner: str, paths: Sequence[str]) -> None:
    """Raise ``ValueError`` if ``owner``, a class, got no paths, or a path that does not exist."""
    if not paths:
        raise ValueError(f"{owner} got an empty list of paths: name at least one file")
    for path in paths:
        if existing(path) is None:
            raise ValueError(f"{owner}.paths has {path}: not readable (there is no such file). Check the path")
