"""Documents that cannot be used are skipped, counted and named, up to a limit."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data.documents import SourceFailed
from data.packing import DocumentStream
from data.text import HubText, LocalText, Splits
from tests.data.faulty import SIZE, ids, table_file


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
