"""Shards on disk and behind a real server that are broken, truncated, late or of another format."""

import gzip
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from data.documents import SourceFailed
from data.retries import Retries
from data.text import HubText
from tests.data.faulty import (
    SIZE,
    Shards,
    ids,
    lines,
    read,
    table_file,
)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", ["json", "mixed", "error page", "gzip", "parquet", "pages", "gone"])
def test_a_broken_local_shard_is_named_at_once(tmp_path, kind, position, waits):
    whole = table_file(tmp_path / "whole")
    ending, good, broken = {
        "json": ("jsonl", lines("a"), lines("b") + b'{"id": "x", "te\n'),
        "mixed": ("jsonl", lines("a"), lines("b") + b'{"id": "x", "text": 3}\n'),
        "error page": ("jsonl", lines("a"), b"<html>502 Bad Gateway</html>"),
        "gzip": ("jsonl.gz", gzip.compress(lines("a")), gzip.compress(lines("b", 500))[:900]),
        "parquet": ("parquet", whole, whole[: len(whole) // 2]),
        "pages": ("parquet", whole, whole[:100] + b"\xff" * 900 + whole[1000:]),
        "gone": ("jsonl", lines("a"), lines("b")),
    }[kind]
    paths = [tmp_path / f"{name}.{ending}" for name in ("one", "two")]
    for path, content in zip(paths, [broken, good][:: 1 - 2 * position], strict=True):
        path.write_bytes(content)
    source = HubText("parquet" if ending == "parquet" else "json", data_files=[str(path) for path in paths])
    with pytest.raises(ValueError, match=rf"(shard|FileNotFoundError:) .*{paths[position].name}"):
        if kind == "gone":
            opened = source.blocks(lambda _: True)
            paths[position].unlink()
            opened.next()
        else:
            ids(source)
    assert waits == []


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Shards]]:
    """Start servers, with datasets' own retries of single requests, which take minutes, switched off."""
    monkeypatch.setattr("datasets.config.STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr("datasets.config.STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_MAX_RETRIES", 1)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_RETRY_INTERVAL", 0)
    started: list[Shards] = []

    def start(*settings: Any) -> Shards:
        started.append(Shards(*settings))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("fault", ["drop", "stall", "refuse", "garbage"])
def test_a_faulty_server_is_outlasted(serve, fault, waits):
    files = {f"{name}.jsonl": lines(name) for name in ("a", "b", "c")}
    server = serve(files, {"b.jsonl": [fault] * 2})
    retries = Retries(timeout_seconds=1.5 if fault == "stall" else 60)
    source = HubText("json", data_files=[server.url(name) for name in files], block_size=SIZE, retries=retries)
    stream = source.blocks(lambda _: True)
    server.armed = True
    found = read(stream)
    assert found == [f"json/{name}-{i}" for name in ("a", "b", "c") for i in range(9)]
    assert waits
    assert server.faults == {"b.jsonl": []}


@pytest.mark.parametrize("fault", ["drop", "stall", "garbage"])
def test_a_server_that_stays_faulty_stops_with_the_shard_named(serve, fault, waits):
    files = {f"{name}.jsonl": lines(name) for name in ("a", "b")}
    server = serve(files, {"b.jsonl": [fault] * 99})
    retries = Retries(limit=1, timeout_seconds=1.5 if fault == "stall" else 60)
    source = HubText("json", data_files=[server.url(name) for name in files], block_size=SIZE, retries=retries)
    stream = source.blocks(lambda _: True)
    server.armed = True
    with pytest.raises(SourceFailed, match=rf"shard {server.url('b.jsonl')}: not readable in 2 tries"):
        while stream.next() is not None:
            pass
    assert waits == [1]
