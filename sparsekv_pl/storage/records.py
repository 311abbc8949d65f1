"""Finished measurements on disk: a run that was killed continues with what is missing.

A folder holds one JSON-lines file per setting and rank; a line is one finished piece of work with its key, its records
and a checksum. Lines are only appended, so a kill loses no finished work. Appending a line and removing damaged ones
need the folder's lock.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sparsekv_pl.storage.own_folder import locked
from sparsekv_pl.storage.result_keys import canonical
from sparsekv_pl.storage.whole_files import replace

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""One measured case: column -> number, text, list of texts, or None."""


class Results:
    """The finished pieces of work in ``folder``.

    Files of all ranks are read; each rank appends to its own. A damaged line is reported and dropped: its work is done
    again.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self._pieces: dict[str, list[Record]] = {}
        paths = sorted(folder.glob("*.jsonl"))
        with self._locked() if paths else nullcontext():
            for path in paths:
                self._pieces |= _read(path)
        self.unread = {*self._pieces}
        """Keys of the pieces found here that nobody has asked for."""

    def get(self, key: str) -> list[Record] | None:
        """The records of a finished piece of work, or None."""
        self.unread.discard(key)
        return self._pieces.get(key)

    def put(self, key: str, records: Sequence[Record], name: str) -> None:
        """Append a finished piece of work to the file ``name``, and sync it to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        body: dict[str, Any] = {"key": key, "records": list(records)}
        line = json.dumps({"checksum": _checksum(body), **body}, allow_nan=False) + "\n"
        path = self.folder / f"{name}.{self.rank}.jsonl"
        try:
            with self._locked(), path.open("ab+") as file:
                file.write(_line_end(file) + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
        self._pieces[key] = body["records"]

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.folder / ".lock")


def rounded(values: Any, digits: int) -> Any:
    """A number, or nested lists of numbers, rounded to significant ``digits``."""
    return [rounded(one, digits) for one in values] if isinstance(values, list) else float(f"{values:.{digits}g}")


def grouped(records: Iterable[Record], *columns: str) -> dict[Any, list[Record]]:
    """The records by their value in a column, or by the tuple of their values in several; first met, first listed."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(itemgetter(*columns)(record), []).append(record)
    return groups


def gathered(records: Sequence[Record]) -> list[Record]:
    """The records of all ranks, in rank order, on every rank. A collective call if there are several ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(records)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, list(records))
    return [record for part in parts for record in part]


def _read(path: Path) -> dict[str, list[Record]]:
    """Read the intact lines of a file; if it has damaged ones, rewrite it without them."""
    pieces: dict[str, list[Record]] = {}
    sound = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            body = json.loads(line)
            checksum = body.pop("checksum")
            if checksum != _checksum(body) or not line.endswith(b"\n"):
                raise ValueError("the checksum is not that of its content")
            pieces[body["key"]] = body["records"]
            sound.append(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s, line %d is damaged (%s): that piece of work is done again", path, number, error)
    if len(sound) < len(lines):
        replace(path, b"".join(sound))
    return pieces


def _line_end(file: BinaryIO) -> bytes:
    """The line end missing after a line that a killed process left unfinished in ``file``; else nothing."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return b""
    file.seek(size - 1)
    return b"" if file.read(1) == b"\n" else b"\n"


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(canonical(body).encode(), digest_size=8).hexdigest()
