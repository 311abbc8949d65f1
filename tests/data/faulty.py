"""Text sources that fail: a stream of tables, and a server of shards with their contents."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from data.documents import Document, Skipped
from data.hub_stream import HubBlocks, table_documents
from data.retries import Retries
from data.text import HubText

ROWS, SIZE = 24, 4
DROP, GARBAGE, LATE = ConnectionError("reset"), pa.ArrowInvalid("no JSON"), TimeoutError("read timed out")


class FaultyStream:
    """The interface of a datasets stream that HubBlocks uses; before row n it runs ``faults[n]`` once."""

    def __init__(self, faults: dict[int, list[Any]]) -> None:
        self.faults, self.row = faults, 0

    def iter(self, size: int) -> Iterator[pa.Table]:
        while self.row < ROWS:
            rows = range(self.row, min(self.row + size, ROWS))
            for row in rows:
                self.row = row + 1  # what was read of a table that fails must be read again
                if faults := self.faults.get(row):
                    fault = faults.pop(0)
                    if isinstance(fault, threading.Event):
                        fault.wait(20)
                    else:
                        raise fault
            yield pa.table({"id": [f"d{row}" for row in rows], "text": [f"text {row}" for row in rows]})

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row = state["row"]


def blocks(faults: dict[int, list[Any]], retries: Retries | None = None) -> HubBlocks:
    return HubBlocks(
        lambda: FaultyStream(faults),
        lambda table, skipped: table_documents(table, "fake", "text", skipped),
        lambda _: True,
        SIZE,
        Skipped("dataset 'fake'", 3),
        retries or Retries(),
    )


def names(block: list[Document] | None) -> list[str]:
    return [document.id for document in block or ()]


ALL = [f"fake/d{row}" for row in range(ROWS)]


def read(source: HubBlocks) -> list[str]:
    """The ids of one epoch."""
    found = []
    while (block := source.next()) is not None:
        found += names(block)
    return found


def lines(name: str, count: int = 9) -> bytes:
    rows = [json.dumps({"id": f"{name}-{i}", "text": f"text {name} {i} {'word ' * 20}"}) for i in range(count)]
    return ("\n".join(rows) + "\n").encode()


def table_file(path: Path, count: int = 400) -> bytes:
    parquet.write_table(pa.table({"text": [f"text {i} " * 30 for i in range(count)]}), path, row_group_size=100)
    return path.read_bytes()


def ids(source: HubText) -> list[str]:
    return [document.id.removeprefix(f"{source.name}/") for document in source.documents()]


class Shards(ThreadingHTTPServer):
    """Serves ``files`` over HTTP with ranges; the first answers for a file are those of ``faults``, each once."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], faults: dict[str, list[str]]) -> None:
        self.files, self.faults, self.released = files, faults, threading.Event()
        self.armed = False
        super().__init__(("127.0.0.1", 0), Answer)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Shards

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.strip("/")
        content = self.server.files[name]
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if body and faults and self.server.armed else None
        if fault == "refuse":
            self.send_error(503)
            return
        if fault == "garbage":
            content = b"<html>" + b"x" * (len(content) - 6)
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            begin, end = asked.removeprefix("bytes=").split("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if not body:
            return
        half = (last - first) // 2
        self.wfile.write(content[first : first + half] if fault in ("drop", "stall") else content[first : last + 1])
        if fault == "stall":
            self.server.released.wait(20)
        if fault:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Silent."""
