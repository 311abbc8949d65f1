"""Streams and shards that stall, break or return garbage are retried; what stays broken stops with an exact state."""

import gzip
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.documents import Document, SourceFailed
from data.hub_stream import HubBlocks
from data.mixture import EvictionData
from data.retries import Retries
from data.text import HubText, Splits, TextSource
from tests.data.faulty import (
    ALL,
    DROP,
    GARBAGE,
    LATE,
    SIZE,
    Shards,
    blocks,
    ids,
    lines,
    names,
    read,
    table_file,
)


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


@dataclass
class Healing(TextSource):
    """Rows of a stream that drops at row 22 for as long as the file ``ill`` is there, the same in every worker."""

    ill: str = field(compare=False)

    def documents(self) -> Iterator[Document]:
        return iter(())

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> HubBlocks:  # noqa: ARG002
        return blocks({22: [DROP] * 99} if Path(self.ill).exists() else {}, Retries(limit=1, first_wait=0))


class Reads(LightningModule):
    """A module that records its batches."""

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
