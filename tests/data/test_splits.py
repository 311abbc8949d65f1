"""A document's split follows from its text; documents that cannot be used are skipped, counted and named."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data.documents import SourceFailed
from data.evaluation import EvaluationData
from data.mixture import EvictionData
from data.packing import DocumentStream, split_tokens
from data.python_source import PythonSource
from data.question_sources import PlantedQuestions
from data.questions import QuestionData
from data.text import EmbeddedText, HubText, LocalText, Splits, TextSource
from tests.data.faulty import SIZE, ids, table_file

TEXTS = [f"Document {i} of a handful. " + "It goes on for a while. " * (i % 5 + 1) for i in range(60)]
SPLITS = Splits(0.5, 0.2, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts in every kind of file, under ids of several kinds, in another order too."""
    found = tmp_path_factory.mktemp("texts")
    rows = [{"text": text} for text in TEXTS]
    for i, text in enumerate(TEXTS):
        (found / f"{i}.txt").write_text(text)
    write_rows(found / "plain.jsonl", rows)
    write_rows(found / "named.jsonl", [row | {"id": f"{i}"} for i, row in enumerate(rows)])
    write_rows(found / "backwards.jsonl", rows[::-1])
    write_rows(found / "twice.jsonl", [*rows, *rows])
    write_rows(found / "spaced.jsonl", [{"text": text.replace(" ", "\r\n ") + "\n"} for text in TEXTS])
    parquet.write_table(pa.Table.from_pylist(rows), found / "rows.parquet")
    return found


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def split_texts(source: TextSource, split: Any) -> set[str]:
    """Return the texts that a stream of the split reads in one epoch, with normalised whitespace."""
    stream, texts = DocumentStream(source, SPLITS, split), set()
    while (document := next(stream)) and stream.epoch == 0:
        texts.add(" ".join(document.text.split()))
    return texts


def test_no_spelling_of_the_source_moves_a_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = ["plain", "named", "backwards", "twice", "spaced"]
    sources: list[TextSource] = [LocalText([f"{name}.jsonl"]) for name in names]  # relative
    sources += [LocalText([str(folder / "plain.jsonl")]), LocalText([f"../{folder.name}/./plain.jsonl"])]
    sources += [LocalText([str(folder / "rows.parquet")]), LocalText([f"{i}.txt" for i in range(60)])]
    sources += [HubText("json", data_files=[str(folder / f"{name}.jsonl")]) for name in ("plain", "named")]
    sources += [HubText("parquet", data_files=[str(folder / "rows.parquet")], streaming=False)]
    for split in ("train", "validation", "held_out"):
        first, *others = (split_texts(source, split) for source in sources)
        assert first, split
        assert all(other == first for other in others), split


def test_training_by_a_relative_path_shares_nothing_with_evaluation_by_an_absolute_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.chdir(folder)
    relative, absolute = LocalText(["plain.jsonl"]), LocalText([str(folder / "plain.jsonl")])
    training = EvictionData(relative, 20, 10, 1, 0, validation_needles=0, validation_windows=2, splits=SPLITS)
    training.tokenizer = tokenizer
    trained = split_texts(training.text, "train")
    validated = tokenizer.decode(split_tokens(relative, SPLITS, "validation", tokenizer, 30).ids)
    held_out = split_texts(absolute, "held_out")
    assert not trained & held_out
    assert not any(text in validated for text in held_out)
    evaluation = EvaluationData(absolute, SPLITS, tasks=[], lengths=[40], windows=3, continuation_tokens=4)
    asked = QuestionData(PlantedQuestions(absolute, SPLITS, facts=1), samples=3, max_tokens=500)
    for data in (evaluation, asked):
        data.tokenizer = tokenizer
        data.setup()
        for batch in data.predict_dataloader():
            read = {name for case in batch["cases"] for name in case.document_ids}
            rows = {int(name.rsplit(":")[1]) - 1 for name in read}
            assert {" ".join(TEXTS[row].split()) for row in rows} <= held_out


@pytest.mark.parametrize("source", [EmbeddedText(), PythonSource()])
def test_the_splits_of_what_every_machine_has_share_no_text(source: TextSource) -> None:
    splits: dict[str, set[str]] = {"train": set(), "validation": set(), "held_out": set()}
    for document in source.documents():
        splits[Splits().of(document.text)].add(" ".join(document.text.split()))
    assert all(splits.values())
    assert not splits["train"] & (splits["validation"] | splits["held_out"])
    assert not splits["validation"] & splits["held_out"]


def test_normal_forms_and_line_ends_are_the_same_text() -> None:
    for i in range(20):
        composed = f"Caf\u00e9 number {i}\nis open."
        assert Splits().of(composed) == Splits().of(f"Cafe\u0301 number {i}\r\nis open.\n")


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
