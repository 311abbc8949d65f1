"""Text sources that stall, drop, return garbage, break for good, or hold documents that cannot be used."""

import gzip
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.documents import Document, Skipped, SourceFailed
from data.hub_stream import HubBlocks, table_documents
from data.mixture import EvictionData
from data.packing import DocumentStream
from data.retries import Retries
from data.text import HubText, LocalText, Splits, TextSource

ROWS, SIZE = 24, 4


class FaultyStream:
    """What HubBlocks uses of a stream of datasets; before row n it does what ``faults[n]`` says, each once."""

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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited."""
    asked: list[float] = []
    monkeypatch.setattr("data.retries.sleep", asked.append)
    return asked


DROP, GARBAGE, LATE = ConnectionError("reset"), pa.ArrowInvalid("no JSON"), TimeoutError("read timed out")


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({6: [DROP]}, [1]),
        ({0: [DROP], 23: [GARBAGE]}, [1, 1]),
        ({7: [DROP, GARBAGE, LATE, DROP, DROP]}, [1, 2, 4, 8, 16]),
    ],
)
def test_a_stream_that_fails_for_a_while_loses_and_repeats_nothing(faults, expected, waits, caplog):
    source = blocks({row: list(errors) for row, errors in faults.items()})
    assert read(source) == ALL == read(source)
    assert waits == expected
    assert caplog.text.count("Opening it again") == len(expected)


def test_a_stall_is_ended_and_its_late_thread_changes_nothing(waits):
    stall = threading.Event()
    source = blocks({9: [stall]}, Retries(timeout_seconds=0.3))
    found = [name for _ in range(3) for name in names(source.next())]
    assert (waits, source.state_dict()["stream"]) == ([1], {"row": 12})
    stall.set()
    for thread in threading.enumerate():
        if thread.name == "text source":
            thread.join(5)
    assert found + read(source) == ALL


def test_the_limit_stops_with_one_error_and_an_exact_state(waits):
    source = blocks({10: [DROP] * 99}, Retries(limit=3, longest_wait=2))
    first = [name for _ in range(2) for name in names(source.next())]
    for _ in range(2):  # asked again it fails again: it must not look like the end of the epoch
        with pytest.raises(
            SourceFailed, match=r"dataset 'fake'.*not readable in 4 tries \(ConnectionError: reset.*\).*resume"
        ):
            source.next()
    assert waits == [1, 2, 2] * 2
    state = json.loads(json.dumps(source.state_dict()))
    healthy = blocks({})
    healthy.load_state_dict(state)
    assert first + read(healthy) == ALL


@pytest.mark.parametrize(
    "settings", [{"limit": -1}, {"first_wait": -1.0}, {"longest_wait": 0.5}, {"timeout_seconds": 0.0}]
)
def test_retries_say_what_is_wrong_with_them(settings):
    with pytest.raises(ValueError, match=rf"retries\.{next(iter(settings))} is"):
        Retries(**settings)


def lines(name: str, count: int = 9) -> bytes:
    rows = [json.dumps({"id": f"{name}-{i}", "text": f"text {name} {i} {'word ' * 20}"}) for i in range(count)]
    return ("\n".join(rows) + "\n").encode()


def table_file(path: Path, count: int = 400) -> bytes:
    parquet.write_table(pa.table({"text": [f"text {i} " * 30 for i in range(count)]}), path, row_group_size=100)
    return path.read_bytes()


def ids(source: HubText) -> list[str]:
    return [document.id.removeprefix(f"{source.name}/") for document in source.documents()]


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


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Shards]]:
    """Starts servers. datasets' own repetitions of single requests, which take minutes, are off."""
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


def unusable_rows(folder: Path) -> HubText:
    """21 rows of which 7 cannot be used, at most 3 in a row."""
    raw = [b"fine 0", b"", None, b"\xff\xfe", b"fine 4", b"nul \0", b"   "] * 3
    binary = pa.array(raw, pa.binary())
    texts = pa.StringArray.from_buffers(len(raw), binary.buffers()[1], binary.buffers()[2], binary.buffers()[0])
    table = pa.table({"id": [f"row{i}" for i in range(len(raw))], "text": texts})
    parquet.write_table(table, folder / "rows.parquet")
    return HubText("parquet", data_files=[str(folder / "rows.parquet")], block_size=SIZE, skip_limit=3)


def test_an_unusable_row_is_skipped_counted_and_the_first_is_named(tmp_path, caplog):
    source = unusable_rows(tmp_path)
    assert ids(source) == ["row0", "row4", "row7", "row11", "row14", "row18"]
    assert source.skipped == 15
    assert caplog.text.count("skipped parquet/row1: its text is empty") == 1
    assert caplog.text.count("skipped") == 1
    source.skip_limit = 2
    with pytest.raises(SourceFailed, match=r"3 documents in a row cannot be used, the last is parquet/row3: .*UTF-8"):
        ids(source)


@pytest.mark.parametrize("consumed", [1, 3, 5, 9])
def test_the_count_is_part_of_the_state(tmp_path, consumed):
    source = unusable_rows(tmp_path)
    streams = [DocumentStream(source, Splits(1, 0, 0), "train") for _ in range(2)]
    for _ in range(consumed):
        next(streams[0])
    streams[1].load_state_dict(json.loads(json.dumps(streams[0].state_dict())))
    for _ in range(12):
        assert streams[1].blocks.skipped == streams[0].blocks.skipped > 0
        assert next(streams[0]) == next(streams[1])


def test_local_documents_that_cannot_be_used_are_counted_once(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"text": "one"}, {"other": 1}, {"text": None}, {"text": 3}, {"text": "\ud800"}, {"text": "two"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = LocalText([str(path)])
    shares = [source.blocks(lambda _: True, number, 2) for number in range(2)]
    assert [[document.text for document in share.next() or ()] for share in shares] == [["one"], ["two"]]
    assert [share.skipped for share in shares] == [4, 0]
    shares[0].next()
    shares[0].next()
    again = source.blocks(lambda _: True, 0, 2)
    again.load_state_dict(shares[0].state_dict())
    assert (again.skipped, again.next()) == (8, None)
    source.skip_limit = 3
    with pytest.raises(SourceFailed, match=r"x\.jsonl: 4 documents in a row cannot be used, the last is .*:5: .*surr"):
        list(source.documents())


def test_a_line_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"x\.txt, line 3: not readable as UTF-8"):
        list(LocalText([str(path)]).documents())


def test_a_parquet_file_that_breaks_off_is_named(tmp_path):
    content = bytearray(table_file(tmp_path / "x.parquet"))
    content[100:1000] = b"\xff" * 900
    (tmp_path / "x.parquet").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"x\.parquet: not (a Parquet file|readable)"):
        list(LocalText([str(tmp_path / "x.parquet")]).documents())


@dataclass
class Healing(TextSource):
    """Rows of a stream that drops at row 22 for as long as the file ``ill`` is there, the same in every worker."""

    ill: str = field(compare=False)

    def documents(self) -> Iterator[Document]:
        return iter(())

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> HubBlocks:  # noqa: ARG002
        return blocks({22: [DROP] * 99} if Path(self.ill).exists() else {}, Retries(limit=1, first_wait=0))


class Reads(LightningModule):
    """Remembers what it read."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.found: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        self.found.append(batch["context_ids"].flatten().tolist())
        return (self.weight * batch["context_ids"].float().std()).cos()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("workers", "accumulated"), [(0, 1), (0, 2), (2, 1)])
def test_a_lost_source_stops_with_a_checkpoint_that_goes_on_where_it_was(tokenizer, tmp_path, workers, accumulated):
    ill, saved = tmp_path / "ill", tmp_path / "saved" / "last.ckpt"

    def fit(resume: bool = False) -> Reads:
        settings: dict[str, Any] = {"context_tokens": 20, "continuation_tokens": 4, "retrieval_share": 0.0}
        settings |= {"validation_windows": 0, "validation_needles": 0, "splits": Splits(1, 0, 0)}
        # Three rows: those of a batch before the one that cannot be read must not be lost.
        data = EvictionData(Healing(str(ill)), batch_size=3, num_workers=workers, **settings)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_steps=6,
            accumulate_grad_batches=accumulated,
            accelerator="cpu",
            callbacks=ModelCheckpoint(saved.parent, "{step}", save_last=True, save_on_exception=True),
            limit_val_batches=0,
            **quiet,
        )
        module = Reads(tokenizer)
        with pytest.raises(SourceFailed, match=r"dataset 'fake'.*2 tries") if ill.exists() else nullcontext():
            trainer.fit(module, data, ckpt_path=min(saved.parent.glob("*.ckpt")) if resume else None)
        return module

    ill.touch()
    stopped = fit()
    ill.unlink()
    resumed = fit(resume=True)
    shutil.rmtree(saved.parent)
    whole = fit()
    done = len(stopped.found) // accumulated * accumulated
    assert 0 < done < len(whole.found) == 6 * accumulated
    assert stopped.found[:done] + resumed.found == whole.found
    assert torch.equal(resumed.weight, whole.weight)
