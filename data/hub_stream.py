"""The stream of a Hugging Face dataset, block by block, opened again where it fails."""

import hashlib
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

from data.documents import BOM, Document, DocumentBlocks, Skipped
from data.retries import Retries


class Reader(NamedTuple):
    """A stream of datasets, and its tables of one block each once reading has begun."""

    stream: Any
    tables: Iterator[Any] | None = None


class HubBlocks(DocumentBlocks):
    """The documents of ``open_stream()`` whose text ``keep`` accepts, ``size`` rows of the stream to a block.

    ``iter(batch_size)`` rather than ``iter()``: inside a worker the latter would divide the shards a
    second time.
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
        """Rows that could not be used so far."""
        return self.counter.count

    def next(self) -> list[Document] | None:
        """SourceFailed after the last try, or for its rows; the state is then still that before this block."""
        reader, self.reader = self.reader, None  # a reader that fails is not used again: a thread may hold it
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
        """The next table. Changes nothing here: it may end in a thread that was left behind."""
        stream, tables = reader or Reader(self.open_stream())
        if tables is None:
            stream.load_state_dict(self.position)
            tables = iter(stream.iter(self.size))
        table = next(tables, None)
        return Reader(stream, tables), table, stream.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The stream's state and the counts."""
        return {"stream": self.position, "skipped": self.counter.count, "in_a_row": self.counter.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read on from a saved state."""
        self.position = state["stream"]
        self.counter.count, self.counter.in_a_row = state["skipped"], state["in_a_row"]
        self.reader = Reader(self.reader.stream) if self.reader else None


def table_documents(table: Any, name: str, text_field: str, skipped: Skipped) -> Iterator[Document]:
    """The rows of a pyarrow.Table that can be used; the others go to ``skipped``, each alone.

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
    """The Python value of a pyarrow scalar; the bytes of a string that is not UTF-8, which Parquet does not check."""
    if scalar is None:
        return None
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
