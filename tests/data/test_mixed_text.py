"""Books, web pages and users' files as one stream: shares, questions about them, splits by content, exact resume."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from data import EvictionData, HubText, LocalText
from data.evaluation import EvaluationData
from data.joined_text import JoinedText
from data.long_haystack import HaystackData
from data.mixed_text import MixedText
from data.mixed_windows import MixedWindows
from data.packing import DocumentStream, WindowStream
from data.question_kinds import QUESTION_KINDS
from data.question_task import QuestionTask
from data.text import Splits
from sparsekv_pl.models.batch import Batch
from tests.data.dialogue import PLAY

SPLITS = Splits(0.6, 0.2, 0.2)
SPEECHES = PLAY.strip().split("\n\n")
WEIGHTS = [2.0, 1.0, 1.0]
WINDOW = 960


def text_of(name: str, number: int, speeches: int) -> str:
    own = [SPEECHES[(number * 7 + i) % len(SPEECHES)] for i in range(speeches)]
    return "\n\n".join([f"{name} {number} begins.", *own, ""])


@pytest.fixture
def mixed(tmp_path: Path) -> MixedText:
    """A folder of Parquet as PG-19's, a stream of JSON lines as FineWeb's, and a user's file with keys of its own."""
    columns = {"short_book_title": "Book", "publication_date": 1900}
    books = [columns | {"url": f"http://b/{i}", "text": text_of("book", i, 60)} for i in range(30)]
    folder = tmp_path / "pg19"
    folder.mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(books[part * 15 : part * 15 + 15])
        parquet.write_table(table, folder / f"train-0000{part}.parquet")
    web = [{"id": f"<urn:{i}>", "dump": "CC", "text": text_of("page", i, 6), "token_count": 9} for i in range(80)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in web))
    own = [{"body": text_of("note", i, 5), "date": i} for i in range(60)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return MixedText(
        [
            HubText(str(folder), block_size=2),
            HubText("json", data_files=[str(tmp_path / "web.jsonl")], block_size=16),
            LocalText([str(tmp_path / "own.jsonl")], text_field="body"),
        ],
        WEIGHTS,
    )


def make(tokenizer: Any, source: MixedText, **options: Any) -> EvictionData:
    settings: dict[str, Any] = {"context_tokens": WINDOW - 60, "continuation_tokens": 60, "batch_size": 2}
    settings |= {"splits": SPLITS, "retrieval_share": 1.0, "validation_windows": 4, "validation_needles": 8}
    settings |= {"questions": dict.fromkeys(QUESTION_KINDS, 1.0), "windows_per_document": 3}
    data = EvictionData(source, **(settings | options))
    data.tokenizer = tokenizer
    data.setup()
    return data


def take(data: EvictionData, count: int) -> list[Batch]:
    return list(islice(iter(data.train_dataloader()), count))


def names_of(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for row in batch["document_ids"] for name in row.split(" + ")]


def source_of(name: str) -> str:
    return "pg19" if "pg19" in name else "own" if "own.jsonl" in name else "web"


def texts_of(source: MixedText) -> dict[str, str]:
    return {document.id: document.text for part in source.sources for document in part.documents()}


def same(one: Batch, other: Batch) -> bool:
    tensors = ("context_ids", "continuation_ids", "labels")
    return all(torch.equal(one[k], other[k]) for k in tensors) and one["document_ids"] == other["document_ids"]  # type: ignore[literal-required]


def test_every_kind_of_question_is_asked_about_every_source_by_weight(tokenizer: Any, mixed: MixedText) -> None:
    batches = take(make(tokenizer, mixed), 60)
    kinds = {kind for batch in batches for task in batch["tasks"] for kind in task.split("+")}
    assert kinds == set(QUESTION_KINDS)
    rows = Counter(source_of(row) for batch in batches for row in batch["document_ids"])
    assert rows["pg19"] == pytest.approx(60, abs=18)
    assert rows["web"] == pytest.approx(30, abs=14)
    contexts = [tokenizer.decode(ids) for batch in batches for ids in batch["context_ids"]]
    assert any("page" in text for text in contexts) and any("note" in text for text in contexts)


def test_no_document_is_in_two_splits_of_any_source(tokenizer: Any, mixed: MixedText) -> None:
    data, texts = make(tokenizer, mixed), texts_of(mixed)
    evaluation = EvaluationData(
        mixed, SPLITS, [QuestionTask("quotes")], [600], windows=6, continuation_tokens=20, cases_per_cell=4
    )
    evaluation.tokenizer = tokenizer
    evaluation.setup()
    asked = {
        name for batch in evaluation.test_dataloader() for case in batch["cases"] for name in case.document_ids
    }  # fmt: skip
    read = {"train": set(names_of(take(data, 80))), "validation": set(names_of(list(data.val_dataloader())))}
    for split, names in (read | {"held_out": asked}).items():
        assert {SPLITS.of(texts[name]) for name in names} == {split}, split
        assert set(map(source_of, names)) == {"pg19", "web", "own"}, split


def test_resumes_to_the_token_in_every_source(tokenizer: Any, mixed: MixedText) -> None:
    first = make(tokenizer, mixed).train_dataloader()
    iterator = iter(first)
    for _ in range(9):
        next(iterator)
    state = first.state_dict()
    rest = [next(iterator) for _ in range(12)]
    assert len(set(map(source_of, names_of(rest)))) == 3
    second = make(tokenizer, mixed).train_dataloader()
    second.load_state_dict(state)
    assert all(map(same, rest, islice(iter(second), 12)))
    for changed, message in (
        ({"windows_per_document": 4}, "windows_per_document was 3, is 4"),
        ({"windows_per_document": None}, "windows_per_document was 3, is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tokenizer, mixed, **changed).train_dataloader().load_state_dict(state)
    mixed.weights = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"text\.weights\[0\] was 2\.0, is 1\.0"):
        make(tokenizer, mixed).train_dataloader().load_state_dict(state)


def test_a_book_gives_a_few_windows_from_another_place_in_every_epoch(tokenizer: Any, mixed: MixedText) -> None:
    def read(most: int | None) -> dict[int, dict[str, list[str]]]:
        documents = DocumentStream(mixed.sources[0], SPLITS, "train", seed=3)
        windows = WindowStream(documents, tokenizer, 500, most)
        found: dict[int, dict[str, list[str]]] = {}
        while documents.epoch < 2:
            window = next(windows)
            if len(window.document_ids) == 1:
                own = found.setdefault(documents.epoch, {}).setdefault(window.document_ids[0], [])
                own.append(tokenizer.decode(window.ids))
        return found

    few, whole = read(2), read(None)
    assert max(map(len, few[0].values())) == 2 < min(map(len, whole[0].values()))
    texts = {name: " ".join(text.split()) for name, text in texts_of(mixed).items()}
    for name, windows in few[0].items():
        assert all(" ".join(window.split())[5:-5] in texts[name] for window in windows)
    assert few[0] != few[1]
    assert read(2) == few


def test_workers_draw_their_sources_apart(tokenizer: Any, mixed: MixedText) -> None:
    def sources(number: int) -> list[str]:
        streams = [
            (WindowStream(DocumentStream(part, SPLITS, "train", 0, number, 2), tokenizer, 200), share)
            for part, share in mixed.parts()
        ]
        windows = MixedWindows(streams, 0, f"{number} of 2")
        return [source_of(next(windows).document_ids[0]) for _ in range(12)]

    assert sources(0) != sources(1)


def test_what_does_not_fit_is_refused(mixed: MixedText, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"MixedText\.sources is \[\]: name at least one source"):
        MixedText([])
    with pytest.raises(ValueError, match=r"weights is \[1.0\]: give one per source, 3 numbers"):
        MixedText(mixed.sources, [1.0])
    with pytest.raises(ValueError, match=r"weights is \[1.0, 0.0, 2.0\]: give numbers above 0"):
        MixedText(mixed.sources, [1.0, 0.0, 2.0])
    with pytest.raises(ValueError, match="name its sources and weights in one list"):
        MixedText([mixed])
    with pytest.raises(ValueError, match=r"mix the sources by weight with data\.mixed_text\.MixedText"):
        JoinedText(mixed.sources)
    with pytest.raises(ValueError, match="windows_per_document is 0: give at least 1, or null"):
        EvictionData(windows_per_document=0)
    data = HaystackData(mixed, tokens=3000)
    data.tokenizer = tokenizer
    with pytest.raises(ValueError, match="give this data one of its sources"):
        data.setup()
        next(iter(data.test_dataloader()))
