"""A document's split follows from its text: spelling of a path, format, id and order do not change it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data.evaluation import EvaluationData
from data.mixture import EvictionData
from data.packing import DocumentStream, split_tokens
from data.python_source import PythonSource
from data.question_sources import PlantedQuestions
from data.questions import QuestionData
from data.text import EmbeddedText, HubText, LocalText, Splits, TextSource

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
