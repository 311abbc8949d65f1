"""The report's scores and bytes over the length that was read and written."""

import math

from sparsekv_pl.reporting.over_length import over_length
from sparsekv_pl.reporting.sorted_records import sorted_records
from sparsekv_pl.storage.records import Record


def record(task: str, case: int, variant: str, **measured: object) -> Record:
    where = {"press": "Knorm", "compression_ratio": 0.0, "prefill": "decoding, every 64 to 128"}
    return (
        {"task": task, "case": str(case), "variant": variant, "nll": 1.0, "tokens": 1, "exact": 0.0} | where | measured
    )


def test_scores_and_bytes_stand_by_stretch_for_each_model() -> None:
    text = [[128, 128 * math.log(2)], [100, 100 * math.log(4)]]
    worse = [[128, 128 * math.log(8)], [100, 100 * math.log(4)]]
    sizes = {"kv_bytes_over_tokens": [[0, 2048], [64, 4096], [128, 4096]]}
    records = [
        record("text", 0, "base", text_stretches=worse, **sizes),
        record("text", 0, "trained", text_stretches=text, **sizes),
        record("copying-250", 0, "base", answer_stretches=[[32, 32], [10, 4]]),
        record("copying-250", 1, "base", answer_stretches=[[32, 0], [10, 1]]),
    ]
    tables = {table.caption.split(": ")[1][:5]: table for table in over_length(sorted_records(records)).tables}
    assert tables["perpl"].header[4:] == ["0-128", "128-228"]
    assert [line[3:] for line in tables["perpl"].lines] == [["base", "8.00", "4.00"], ["trained", "2.00", "4.00"]]
    assert tables["share"].lines == [["Knorm", "0.00", "decoding, every 64 to 128", "base", "0.50", "0.25"]]
    assert tables["KiB o"].lines[0][4:] == ["2", "4", "4"]
    assert tables["KiB o"].header[4:] == ["after 0", "after 64", "after 128"]


def test_many_stretches_are_joined_and_records_without_any_have_no_table() -> None:
    long = record("text", 0, "base", text_stretches=[[128, 0.0]] * 16)
    [table] = over_length(sorted_records([long])).tables
    assert table.header[4:] == [f"{start:,}-{start + 256:,}" for start in range(0, 2048, 256)]
    assert over_length(sorted_records([record("text", 0, "base")])).tables == []
