"""Windows of exact lengths; ranks and workers read every document of a split once an epoch, whatever the shards."""

import json
from copy import deepcopy
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest

from data.mixture import EvictionData
from data.mixture_stream import MixtureStream
from data.packing import DocumentStream, Tokens, WindowStream, encode_document, spread_windows, take_tokens
from data.resumable import RankStatefulLoader
from data.text import EmbeddedText, HubText, LocalText, Splits, TextSource
from sparsekv_pl.models.encoding import Encoder

ALL = Splits(1, 0, 0)


def test_order_depends_on_seed_and_epoch(numbered):
    def two_epochs(seed):
        stream = DocumentStream(numbered, ALL, "train", seed)
        ids = [next(stream).id for _ in range(80)]
        return ids[:40], ids[40:]

    first, second = two_epochs(0)
    assert sorted(first) == sorted(second)
    assert first != second
    assert two_epochs(0) == (first, second)
    assert two_epochs(1)[0] != first


def test_windows_are_the_documents_in_order_without_gaps(numbered, tokenizer):
    windows = WindowStream(DocumentStream(numbered, ALL, "train"), tokenizer, 50)
    documents = DocumentStream(numbered, ALL, "train")
    expected, owner = [], []
    for _ in range(20):
        document = next(documents)
        ids = encode_document(Encoder(tokenizer), document)
        expected += ids
        owner += [document.id] * len(ids)
    for i in range(60):
        window = next(windows)
        assert window.ids == expected[i * 50 : (i + 1) * 50]
        assert window.document_ids == list(dict.fromkeys(owner[i * 50 : (i + 1) * 50]))


@pytest.mark.parametrize("consumed", [0, 1, 7, 250])
def test_windows_resume_exactly(numbered, tokenizer, consumed):
    def stream():
        return WindowStream(DocumentStream(numbered, ALL, "train"), tokenizer, 50)

    first, second = stream(), stream()
    for _ in range(consumed):
        next(first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(40):
        assert next(first) == next(second)


def test_state_of_another_share_is_refused(numbered):
    state = DocumentStream(numbered, ALL, "train", 0, 0, 2).state_dict()
    with pytest.raises(ValueError, match=r"share 0 of 2.*as many ranks and workers"):
        DocumentStream(numbered, ALL, "train", 0, 0, 1).load_state_dict(state)


def test_share_without_documents_is_an_error(numbered):
    numbered.count = 1
    with pytest.raises(ValueError, match=r"share 1 of 2.*no document"):
        next(DocumentStream(numbered, ALL, "train", 0, 1, 2))


def test_spread_windows_never_predict_a_token_twice(tokenizer):
    text = Tokens(list(range(100)), [("a", 60), ("b", 40)])
    windows = spread_windows(text, 7, window=40, fresh=10, encoder=Encoder(tokenizer))
    predicted = [i for window in windows for i in window.ids[-10:]]
    assert len(predicted) == len(set(predicted)) == 70
    assert windows[0].document_ids == ["a"]
    assert windows[3].document_ids == ["a", "b"]
    assert windows[-1].document_ids == ["b"]
    with pytest.raises(ValueError, match=r"8 windows of 40 tokens.*room for 7"):
        spread_windows(text, 8, window=40, fresh=10, encoder=Encoder(tokenizer))


def test_take_tokens_stops_when_there_is_enough(numbered, tokenizer):
    taken = take_tokens(numbered.documents(), tokenizer, enough=100)
    assert taken.document_ids == ["doc/0"]
    assert len(take_tokens(numbered.documents(), tokenizer, enough=10**9).spans) == 40


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
