"""Where text comes from, and which documents belong to which split."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.facts import Split

log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text with an id that is the same on every machine and in every run."""

    id: str
    text: str


class Blocks(ABC):
    """Reads the documents of one worker block by block; the reader's state is exact between two blocks."""

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

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents once, in the source's order."""

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> Blocks:
        """The share ``number`` of ``total`` of the documents whose id ``keep`` accepts; in memory, as one
        block.
        """
        return _InMemory([d for d in self.documents() if keep(d.id)][number::total])


@dataclass(frozen=True)
class Splits:
    """Divides documents by a stable hash of their id: the same document is in the same split, always and
    everywhere.

    Shares are fractions that add up to 1. ``key`` seeds the hash; the default gives the embedded text, which
    has few and very unequal documents, a fair number of characters in each split.
    """

    train: float = 0.8
    validation: float = 0.1
    held_out: float = 0.1
    key: str = "7"

    def __post_init__(self) -> None:
        shares = (self.train, self.validation, self.held_out)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"split shares are {shares}: give three fractions that add up to 1")

    def of(self, document_id: str) -> Split:
        """The split that a document belongs to."""
        digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=self.key.encode()).digest()
        draw = int.from_bytes(digest, "big") / 2**64
        if draw < self.train:
            return "train"
        return "validation" if draw < self.train + self.validation else "held_out"


@dataclass
class EmbeddedText(TextSource):
    """The Python documentation that ships with the interpreter (pydoc_data.topics), one document per topic.
    No download.
    """

    def documents(self) -> Iterator[Document]:
        """79 topics in Python 3.11, 465 KB together."""
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            yield Document(f"pydoc/{topic}", topics[topic])


@dataclass
class LocalText(TextSource):
    """Local files, held in memory: .txt is one document, each row of .jsonl, .json (JSON lines) and .parquet
    is one.

    Parameters
    ----------
    paths
        Files. A document's id is its path as given, with the line or row for the formats that hold many.
    text_field
        The key or column that holds the text.
    skip_broken
        Skip broken JSONL lines instead of stopping; ``skipped`` counts them in the last reading, and the log
        says how many.
    """

    paths: list[str]
    text_field: str = "text"
    skip_broken: bool = False
    skipped: int = field(default=0, init=False)

    def documents(self) -> Iterator[Document]:
        """ValueError names the file (and the line) that is missing, empty, broken or of an unknown kind."""
        if not self.paths:
            raise ValueError("LocalText got an empty list of paths: name at least one file")
        self.skipped = 0
        readers = {
            ".txt": self._text,
            ".jsonl": self._json_lines,
            ".json": self._json_lines,
            ".parquet": self._parquet,
        }
        for path in map(Path, self.paths):
            if path.suffix not in readers:
                raise ValueError(f"{path}: unknown kind of file, give one of {sorted(readers)}")
            try:
                found = list(readers[path.suffix](path))
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path}: not readable as UTF-8 text or Parquet ({error}). Check the path and the file"
                ) from error
            if not any(document.text.strip() for document in found):
                raise ValueError(
                    f"{path}: holds no text. Remove it from paths, or name the right text_field ({self.text_field!r})"
                )
            yield from found
        if self.skipped:
            log.warning("skipped %d broken lines in %d files", self.skipped, len(self.paths))

    def _text(self, path: Path) -> Iterator[Document]:
        yield Document(str(path), path.read_text(encoding="utf-8"))

    def _json_lines(self, path: Path) -> Iterator[Document]:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                    if not isinstance(text, str):
                        raise TypeError(f"{self.text_field!r} is not a string")
                except (ValueError, KeyError, TypeError) as error:
                    if not self.skip_broken:
                        raise ValueError(
                            f"{path}, line {number}: broken ({type(error).__name__}: {error}). Each line is "
                            "a JSON object with a string "
                            f"{self.text_field!r}; repair it or set skip_broken: true"
                        ) from error
                    self.skipped += 1
                    continue
                yield Document(f"{path}:{number}", text)

    def _parquet(self, path: Path) -> Iterator[Document]:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowInvalid

        try:
            file = parquet.ParquetFile(path)
        except ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from error
        names = file.schema_arrow.names
        if self.text_field not in names:
            raise ValueError(f"{path}: no column {self.text_field!r}, set text_field to one of {names}")
        row = 0
        for batch in file.iter_batches(columns=[self.text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text:
                    yield Document(f"{path}:{row}", text)


@dataclass
class HubText(TextSource):
    """A Hugging Face dataset by name, streamed (the default) or downloaded whole.

    Parameters
    ----------
    name, config, split, data_files
        As in datasets.load_dataset; ``config`` for instance "sample-10BT" for HuggingFaceFW/fineweb-edu, "en"
        for allenai/c4.
    text_field
        The column that holds the text. The id comes from the column id, else url, else it is a hash of the
        text.
    streaming
        Read on the fly. Documents are then shuffled in blocks of ``block_size``, which is what resumes
        exactly.
    """

    name: str = "HuggingFaceFW/fineweb-edu"
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    streaming: bool = True
    data_files: list[str] | None = None
    block_size: int = 256

    def documents(self) -> Iterator[Document]:
        """The documents in the dataset's order."""
        for row in self._load():
            yield self._document(row)

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> Blocks:
        """Streamed: whole shards where they divide by ``total``, else every total-th row; filtered by
        ``keep`` after that.
        """
        if not self.streaming:
            return super().blocks(keep, number, total)
        from datasets.distributed import split_dataset_by_node

        return _HubBlocks(self, split_dataset_by_node(self._load(), rank=number, world_size=total), keep)

    def _load(self) -> Any:
        from datasets import load_dataset

        try:
            found = load_dataset(
                self.name, self.config, split=self.split, streaming=self.streaming, data_files=self.data_files
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"could not open the dataset {self.name!r} (config {self.config!r}, split {self.split!r}): "
                f"{error}. Check the name and "
                "the connection (HF_HUB_OFFLINE), or use LocalText or EmbeddedText"
            ) from error
        columns = found.column_names
        if columns is not None and self.text_field not in columns:
            raise ValueError(
                f"dataset {self.name!r} has no column {self.text_field!r}: set text_field to one of {columns}"
            )
        return found

    def _document(self, row: dict[str, Any]) -> Document:
        text = row[self.text_field] or ""
        known = row.get("id") or row.get("url") or hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return Document(f"{self.name}/{known}", text)


class _InMemory(Blocks):
    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.read = False

    def next(self) -> list[Document] | None:
        self.read = not self.read
        return self.documents if self.read else None

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


class _HubBlocks(Blocks):
    """``iter(batch_size)`` rather than ``iter()``: inside a worker the latter would divide the shards a
    second time.
    """

    def __init__(self, source: HubText, stream: Any, keep: Callable[[str], bool]) -> None:
        self.source, self.stream, self.keep = source, stream, keep
        self.beginning = stream.state_dict() if hasattr(stream, "state_dict") else {}
        self.state = self.beginning
        self.batches: Iterator[dict[str, list[Any]]] | None = None

    def next(self) -> list[Document] | None:
        if self.batches is None:
            self.batches = self.stream.iter(self.source.block_size)
        batch = next(self.batches, None)
        if batch is None:
            self.load_state_dict(self.beginning)
            return None
        self.state = self.stream.state_dict()
        rows = (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
        return [document for document in map(self.source._document, rows) if self.keep(document.id)]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self.state, self.batches = state, None
