from pathlib import Path

import pytest

from data.joined_text import JoinedText
from data.resumable import flat_settings
from data.text import EmbeddedText, HubText, LocalText, Splits


def _two(tmp_path: Path) -> JoinedText:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("three")
    return JoinedText([LocalText([str(tmp_path / "a.jsonl")]), LocalText([str(tmp_path / "b.txt")])])


def test_documents_come_from_every_source_in_order_and_unusable_ones_are_counted(tmp_path: Path) -> None:
    text = _two(tmp_path)
    for _ in range(2):
        assert [document.text for document in text.documents()] == ["one", "two", "three"]
        assert text.skipped == 1


def test_splits_and_shares_divide_all_documents(tmp_path: Path) -> None:
    text, splits = JoinedText([EmbeddedText(), *_two(tmp_path).sources]), Splits()
    whole = [document.text for document in text.documents()]
    found = []
    for split in ("train", "validation", "held_out"):
        for number in range(2):
            found += text.blocks(lambda content, split=split: splits.of(content) == split, number, 2).next() or []  # type: ignore[misc]
    assert sorted(document.text for document in found) == sorted(whole)


def test_a_resume_sees_every_source(tmp_path: Path) -> None:
    text = _two(tmp_path)
    before = flat_settings("text", text)
    (tmp_path / "b.txt").write_text("other text")
    changed = flat_settings("text", text)
    assert {key for key in before if before[key] != changed[key]} == {"text.sources[1].paths[0]"}


def test_no_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"JoinedText\.sources is \[\]: name at least one source"):
        JoinedText([])


def test_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sources\[1\] streams 'some/text'.*set its streaming to false"):
        JoinedText([EmbeddedText(), HubText("some/text")])
