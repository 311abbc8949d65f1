"""Sources of text, and the division of documents into splits."""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import Any

from data.documents import BOM, Document, DocumentBlocks, Skipped, SourceFailed, TextSource, check_files
from data.facts import Split
from data.hub_stream import HubBlocks, python_value, table_documents
from data.retries import Retries, file_read

__all__ = ["Document", "DocumentBlocks", "EmbeddedText", "HubText", "LocalText", "SourceFailed", "Splits", "TextSource"]

log = logging.getLogger(__name__)

FOUND_IN_FOLDERS = (".jsonl", ".parquet", ".txt")
"""Suffixes of the files that a folder stands for; a .json file is often no text, so it is read only if named."""


@dataclass(frozen=True)
class Splits:
    """Splits of documents by a stable hash of their text, so that a text has the same split in every source.

    Raises ``ValueError`` if the shares are negative or do not add up to 1.

    Parameters
    ----------
    train, validation, held_out
        Shares of the documents; fractions that add up to 1.
    key
        Seed of the hash. The default gives each split of Python 3.11's embedded text, which has few documents of very
        different lengths, a fair share of the characters.
    """

    train: float = 0.8
    validation: float = 0.1
    held_out: float = 0.1
    key: str = "1509"

    def __post_init__(self) -> None:
        shares = (self.train, self.validation, self.held_out)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"split shares are {shares}: give three fractions that add up to 1")

    def of(self, text: str) -> Split:
        """Return the split of a document with this text; whitespace and Unicode's normal forms do not matter."""
        content = unicodedata.normalize("NFC", " ".join(text.removeprefix(BOM).split())).encode()
        digest = hashlib.blake2b(content, digest_size=8, key=self.key.encode()).digest()
        draw = int.from_bytes(digest, "big") / 2**64
        if draw < self.train:
            return "train"
        return "validation" if draw < self.train + self.validation else "held_out"


@dataclass
class EmbeddedText(TextSource):
    """The Python documentation in the interpreter (pydoc_data.topics), one document per topic. No download."""

    def documents(self) -> Iterator[Document]:
        """Yield the topics: 79 in Python 3.11, with 465 KB together."""
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            yield Document(f"pydoc/{topic}", topics[topic])


@dataclass
class LocalText(TextSource):
    """Local files, in memory: a .txt file is one document, as is each row of .jsonl, .json (JSON lines) and .parquet.

    Documents without usable text (none, empty, not a string, no valid Unicode) are skipped; ``skipped`` counts those of
    the last reading.

    Parameters
    ----------
    paths
        The files, and folders, which stand for the .txt, .jsonl and .parquet files in them at any depth, by name. A
        document's id is its path as given, with the line or row for formats with many documents.
    text_field
        The key or column of the text.
    skip_broken
        Also skip and count JSONL lines that are no JSON objects in UTF-8, instead of stopping.
    skip_limit
        Most unusable documents in a row; more stop the run.

    Raises
    ------
    ValueError
        If there are no paths, or one of them does not exist.
    """

    paths: list[str]
    text_field: str = "text"
    skip_broken: bool = False
    skip_limit: int = field(default=100, compare=False)
    skipped: int = field(default=0, init=False, compare=False)

    def __post_init__(self) -> None:
        check_files("LocalText", self.paths)

    def documents(self) -> Iterator[Document]:
        """Yield the documents; ``ValueError`` names a broken or unknown file and its line, and a path without text."""
        self.skipped, files = 0, 0
        for path in (Path(path).expanduser() for path in self.paths):
            counter, empty, skipped = Skipped(str(path), self.skip_limit), True, self.skipped
            for file in self._files(path):
                found = self._found(file, counter)
                self.skipped, files = skipped + counter.count, files + 1
                empty = empty and not found
                yield from found
            if empty:
                field = "" if path.suffix == ".txt" else f", or name the right text_field ({self.text_field!r})"
                raise ValueError(
                    f"{path}: holds no text: {counter.first}; {counter.count} unusable in all. Repair it or remove it "
                    f"from paths{field}"
                )
        if self.skipped:
            log.warning("skipped %d unusable documents in %d files", self.skipped, files)

    def _files(self, path: Path) -> list[Path]:
        """Return a file, or the files in a folder."""
        if not path.is_dir():
            return [path]
        inside = sorted(file for file in path.rglob("*") if file.suffix in FOUND_IN_FOLDERS)
        if not inside:
            raise ValueError(f"{path}: no {', '.join(FOUND_IN_FOLDERS)} file in this folder. Check the path")
        return inside

    def _found(self, path: Path, counter: Skipped) -> list[Document]:
        """Return a file's documents; one without any counts as an unusable document."""
        readers = {".txt": self._text, ".jsonl": self._json_lines, ".json": self._json_lines, ".parquet": self._parquet}
        if path.suffix not in readers:
            raise ValueError(f"{path}: unknown kind of file, give one of {sorted(readers)}")
        before = counter.count
        try:
            rows = readers[path.suffix](path, counter)
            found = [Document(name, text.removeprefix(BOM)) for name, text in rows if counter.usable(name, text)]
        except OSError as error:
            raise ValueError(f"{path}: not readable ({error}). Check the path and the file") from error
        if not found and counter.count == before:
            counter.skip(str(path), "it has no documents")
        return found

    def _text(self, path: Path, counter: Skipped) -> Iterator[tuple[str, Any]]:  # noqa: ARG002
        content = path.read_bytes()
        try:
            yield str(path), content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{path}, line {line}: not readable as UTF-8 text ({error}). Convert the file") from error

    def _json_lines(self, path: Path, counter: Skipped) -> Iterator[tuple[str, Any]]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(row, dict):
                        raise TypeError(f"it is of type {type(row).__name__}")
                except (ValueError, TypeError, RecursionError) as error:
                    why = f"broken ({type(error).__name__}: {error})"
                    if not self.skip_broken:
                        raise ValueError(
                            f"{path}, line {number}: {why}. Each line is a JSON object with a string "
                            f"{self.text_field!r}; repair it or set skip_broken: true"
                        ) from error
                    counter.skip(f"{path}:{number}", why)
                else:
                    yield f"{path}:{number}", row.get(self.text_field)

    def _parquet(self, path: Path, counter: Skipped) -> Iterator[tuple[str, Any]]:  # noqa: ARG002
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        row = 0
        try:
            file = parquet.ParquetFile(path)
            names = file.schema_arrow.names
            if self.text_field not in names:
                raise ValueError(f"{path}: no column {self.text_field!r}, set text_field to one of {names}")
            for batch in file.iter_batches(columns=[self.text_field]):
                for value in batch.column(0):
                    row += 1
                    yield f"{path}:{row}", python_value(value)
        except ArrowException as error:
            what = f"broken after row {row}" if row else "not a Parquet file"
            raise ValueError(f"{path}: {what} ({error}). Repair or remove it") from error


@dataclass
class HubText(TextSource):
    """A Hugging Face dataset, streamed (the default) or downloaded.

    A stream that stalls, drops the connection or returns garbage is opened again at the same row. If a shard stays
    broken, the run stops with its name. Rows without usable text (none, empty, not a string, no valid Unicode) are
    skipped and counted.

    Parameters
    ----------
    name, config, split, data_files
        As in datasets.load_dataset; ``config`` is for instance "sample-10BT" for HuggingFaceFW/fineweb-edu, "en" for
        allenai/c4.
    text_field
        The column of the text. The id comes from the column id, else url, else it is a hash of the text.
    streaming
        Read without a download. Documents are then shuffled in blocks of ``block_size`` rows, so that reading resumes
        exactly.
    block_size
        Rows per block.
    retries
        Timeout and retries of the stream.
    skip_limit
        Most unusable rows one after another; more stop the run.
    """

    name: str = "HuggingFaceFW/fineweb-edu"
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    streaming: bool = True
    data_files: list[str] | None = None
    block_size: int = 256
    retries: Retries = field(default_factory=Retries, compare=False)
    skip_limit: int = field(default=100, compare=False)
    skipped: int = field(default=0, init=False, compare=False)

    def documents(self) -> Iterator[Document]:
        """Yield the documents in the dataset's order."""
        if self.streaming:
            blocks = self.blocks(lambda _: True)
            while (block := blocks.next()) is not None:
                self.skipped = blocks.skipped
                yield from block
            return
        counter = Skipped(self._source, self.skip_limit)
        for table in self._open().with_format("arrow").iter(self.block_size):
            yield from table_documents(table, self.name, self.text_field, counter)
        self.skipped = counter.count

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> DocumentBlocks:
        """Return share ``number`` of ``total`` of the documents whose text ``keep`` accepts.

        Streamed shares are whole shards if their number is divisible by ``total``, else every ``total``-th row.
        """
        if not self.streaming:
            return super().blocks(keep, number, total)
        from datasets.distributed import split_dataset_by_node

        return HubBlocks(
            lambda: split_dataset_by_node(self._open(), rank=number, world_size=total).with_format("arrow"),
            lambda table, counter: table_documents(table, self.name, self.text_field, counter),
            keep,
            self.block_size,
            Skipped(self._source, self.skip_limit),
            self.retries,
        )

    @property
    def _source(self) -> str:
        return f"dataset {self.name!r} (config {self.config!r}, split {self.split!r})"

    def _open(self) -> Any:
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(self.name, self.config, data_files=self.data_files)
            if hasattr(builder.config, "on_mixed_types"):
                # If one row's text is a number, datasets would return all texts around it as JSON, in quotes.
                builder.config.on_mixed_types = None
            if self.streaming:
                found: Any = builder.as_streaming_dataset(split=self.split)
            else:
                builder.download_and_prepare()
                found = builder.as_dataset(split=self.split)
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            shard = file_read(walk_tb(error.__traceback__))
            raise ValueError(
                f"could not open the {self._source}{f', shard {shard}' if shard else ''}: "
                f"{error}. Check the name and "
                "the connection (HF_HUB_OFFLINE), or use LocalText or EmbeddedText"
            ) from error
        columns = found.column_names
        if columns is not None and self.text_field not in columns:
            raise ValueError(
                f"dataset {self.name!r} has no column {self.text_field!r}: set text_field to one of {columns}"
            )
        return found
