"""Ranks and workers read every document of a split once an epoch, however many shards the text comes in."""

import json
from copy import deepcopy
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest

from data.mixture import EvictionData, MixtureStream
from data.packing import DocumentStream
from data.resumable import RankStatefulLoader
from data.text import EmbeddedText, HubText, LocalText, Splits, TextSource

RANKS, WORKERS, SHARDS = (1, 2, 3), (0, 2, 3), (1, 2, 3, 5, 7)
SHARES = sorted({ranks * max(1, workers) for ranks, workers in product(RANKS, WORKERS)})
SPLITS = Splits(0.5, 0.25, 0.25)
DOCUMENTS = 150


@pytest.fixture(autouse=True)
def opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every share opens the same dataset: that takes ten times as long as reading its few rows."""
    import datasets

    opened: dict[str, Any] = {}
    load = datasets.load_dataset

    def load_copy(*arguments: Any, **settings: Any) -> Any:
        key = repr((arguments, settings))
        if key not in opened:
            opened[key] = load(*arguments, **settings)
        return deepcopy(opened[key])

    monkeypatch.setattr(datasets, "load_dataset", load_copy)


def shard_rows(shard: int, shards: int) -> list[dict[str, str]]:
    """Unequal shards: the first holds half of the documents and more. Texts of 18 characters."""
    cuts = [0, *(DOCUMENTS // 2 + DOCUMENTS * i // (2 * shards) for i in range(1, shards)), DOCUMENTS]
    return [{"id": f"{i}", "text": f"text number {i:06}"} for i in range(cuts[shard], cuts[shard + 1])]


def source(kind: str, shards: int, folder: Path) -> TextSource:
    if kind == "embedded":
        return EmbeddedText()
    paths = []
    for shard in range(shards):
        path = folder / f"{shard}-of-{shards}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in shard_rows(shard, shards)))
        paths.append(str(path))
    if kind == "local":
        return LocalText(paths)
    if kind == "hub_parquet":
        return HubText("parquet", data_files=[as_parquet(Path(path)) for path in paths], block_size=16)
    return HubText("json", data_files=paths, block_size=16)


def as_parquet(path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.Table.from_pylist([json.loads(line) for line in path.read_text().splitlines()])
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=10)
    return str(path.with_suffix(".parquet"))


def one_epoch(stream: DocumentStream) -> list[str]:
    ids = []
    while (document := next(stream)) and stream.epoch == 0:
        ids.append(document.id)
    return ids


def assert_read_once(shares: list[list[str]], expected: set[str]) -> None:
    read = [name for share in shares for name in share]
    assert len(read) == len(set(read)), "a document was read twice"
    assert set(read) == expected, "documents were lost"


@pytest.mark.parametrize(
    ("kind", "shards"),
    [("embedded", 1), ("hub_parquet", 3), ("local", 1), ("local", 5), *(("hub", shards) for shards in SHARDS)],
)
def test_shares_of_every_split_are_disjoint_and_complete(kind: str, shards: int, tmp_path: Path) -> None:
    text = source(kind, shards, tmp_path)
    whole: dict[str, set[str]] = {"train": set(), "validation": set(), "held_out": set()}
    for document in text.documents():
        whole[SPLITS.of(document.text)].add(document.id)
    assert kind == "embedded" or sum(map(len, whole.values())) == DOCUMENTS
    for total in SHARES:
        for split in ("train", "validation", "held_out") if total in (2, 6) else ("train",):
            shares = [one_epoch(DocumentStream(text, SPLITS, split, 0, n, total)) for n in range(total)]
            assert_read_once(shares, whole[split])


@pytest.mark.parametrize(
    ("ranks", "workers", "shards"),
    [(1, 0, 3), (2, 2, 7), (2, 3, 3), (3, 2, 1)],
)
def test_loaders_with_worker_processes_read_everything_once(
    ranks: int, workers: int, shards: int, tokenizer: Any, tmp_path: Path
) -> None:
    """Documents of 20 tokens in windows of 20 tokens: a batch of one row is one document."""
    text = source("hub", shards, tmp_path)
    data = EvictionData(text, context_tokens=15, continuation_tokens=5, batch_size=1, retrieval_share=0, splits=SPLITS)
    data.tokenizer = tokenizer
    train = {document.id for document in text.documents() if SPLITS.of(document.text) == "train"}
    turns = max(1, workers)
    shares = []
    for rank in range(ranks):
        loader = RankStatefulLoader(MixtureStream(data, rank, ranks), 10**6, workers)
        names = [batch["document_ids"][0] for batch in islice(iter(loader), turns * (len(train) + 1))]
        for worker in range(turns):  # workers take turns
            own = names[worker::turns]
            epoch = list(dict.fromkeys(own))
            assert own[: len(epoch)] == epoch, "a document came again before the epoch was over"
            assert len(own) > len(epoch)
            shares.append(epoch)
    assert_read_once(shares, train)


@pytest.mark.parametrize(("shards", "total"), [(1, 2), (2, 2), (3, 2), (7, 6)])
def test_every_share_of_a_stream_resumes_exactly(shards: int, total: int, tmp_path: Path) -> None:
    text = source("hub", shards, tmp_path)
    for number, consumed in product({0, total - 1}, (1, 9)):
        first = DocumentStream(text, SPLITS, "train", 3, number, total)
        for _ in range(consumed):
            next(first)
        second = DocumentStream(text, SPLITS, "train", 3, number, total)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [next(second).id for _ in range(40)] == [next(first).id for _ in range(40)]
