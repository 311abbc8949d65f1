"""The stream of a Hugging Face dataset, read block by block and reopened at the same row after a failure."""

import hashlib
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

from data.documents import BOM, Document, DocumentBlocks, Skipped
from data.retries import Retries


class Reader(NamedTuple):
    """A stream of datasets, and the iterator over its tables of one block each once reading has begun."""

    stream: Any
    tables: Iterator[Any] | None = None


class HubBlocks(DocumentBlocks):
    """The documents of ``open_stream()`` whose text ``keep`` accepts, with ``size`` rows of the stream per block.

    Uses ``iter(batch_size)``, because ``iter()`` would divide the shards a second time inside a worker.
    """

    def __init__(
        self,
        open_stream: Callable[[], Any],
        documents: Callable[[Any, Skipped], Iterator[Document]],
        keep: Callable[[str], bool],
        size: int,
        skipped: Skipped,
        retries: Retries,
    ) -> None:
        self.open_stream, self.documents, self.keep = open_stream, documents, keep
        self.size, self.counter, self.retries = size, skipped, retries
        stream = open_stream()
        self.reader: Reader | None = Reader(stream)
        self.beginning = self.position = stream.state_dict()

    @property
    def skipped(self) -> int:  # type: ignore[override]
        """Number of unusable rows so far."""
        return self.counter.count

    def next(self) -> list[Document] | None:
        """Return the next block, or None at the end of the epoch.

        Raises ``SourceFailed`` after the last try or for too many unusable rows; the state is then that before this
        block.
        """
        reader, self.reader = self.reader, None  # a reader that failed is not reused: a thread may still hold it
        reader, table, position = self.retries.call(
            lambda first: self._read(reader if first else None), self.counter.source
        )
        if table is None:
            self.reader, self.position = Reader(reader.stream), self.beginning
            return None
        counter = copy(self.counter)
        found = [document for document in self.documents(table, counter) if self.keep(document.text)]
        self.reader, self.position, self.counter = reader, position, counter
        return found

    def _read(self, reader: Reader | None) -> tuple[Reader, Any, dict[str, Any]]:
        """Read the next table. Does not change this object, because it may run in an abandoned thread."""
        stream, tables = reader or Reader(self.open_stream())
        if tables is None:
            stream.load_state_dict(self.position)
            tables = iter(stream.iter(self.size))
        table = next(tables, None)
        return Reader(stream, tables), table, stream.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state and the counts of unusable rows."""
        return {"stream": self.position, "skipped": self.counter.count, "in_a_row": self.counter.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.position = state["stream"]
        self.counter.count, self.counter.in_a_row = state["skipped"], state["in_a_row"]
        self.reader = Reader(self.reader.stream) if self.reader else None


def table_documents(table: Any, name: str, text_field: str, skipped: Skipped) -> Iterator[Document]:
    """Yield the usable rows of a pyarrow.Table as documents; the others are counted by ``skipped``.

    The id comes from the column id, else url, else it is a hash of the text.
    """
    given = [table.column(field) for field in ("id", "url") if field in table.column_names]
    texts = table.column(text_field) if text_field in table.column_names else [None] * table.num_rows
    for row in range(table.num_rows):
        text = python_value(texts[row])
        known = next(filter(None, (python_value(column[row]) for column in given)), None)
        if not skipped.usable(f"{name}/{known or '(a row without id)'}", text):
            continue
        text = text.removeprefix(BOM)
        yield Document(f"{name}/{known or hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}", text)


def python_value(scalar: Any) -> Any:
    """Return the Python value of a pyarrow scalar; bytes for a string that is not UTF-8, which Parquet allows."""
    if scalar is None:
        return None
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
