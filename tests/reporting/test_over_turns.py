"""The report's answers and bytes over the turns of a conversation."""

from sparsekv_pl.reporting.over_turns import over_turns
from sparsekv_pl.reporting.sorted_records import sorted_records
from sparsekv_pl.reporting.turn_curves import turns_figure
from sparsekv_pl.storage.records import Record


def record(case: int, variant: str, exact: float, press: str = "Knorm", **measured: object) -> Record:
    where = {"press": press, "compression_ratio": 0.5, "prefill": "prefill and decoding, every turn"}
    if press == "full cache":
        where |= {"compression_ratio": 0.0, "prefill": "dense"}
    found = {"task": "turns-4", "case": str(case), "variant": variant, "exact": exact, "turn": 4, "turns_since": 1}
    return found | where | measured


def test_answers_stand_by_turn_and_distance_and_stale_ones_apart() -> None:
    sizes = {"kv_bytes_over_turns": [1024, 2048, 2048]}
    records = [
        record(0, "base", 1.0, "full cache", kv_bytes=1024),
        record(0, "base", 0.0, stale=1.0, **sizes),
        record(1, "base", 0.0, stale=0.0, **sizes),
        record(2, "base", 1.0, turn=2, turns_since=3, kv_bytes_over_turns=[1024]),
        record(0, "trained", 1.0, stale=0.0, **sizes),
        record(1, "trained", 0.0, stale=0.0, **sizes),
    ]
    section = over_turns(sorted_records(records))
    tables = {table.caption.partition(" (")[0]: table for table in section.tables}
    asked = tables["right answers by the turn that asks"]
    assert asked.header[3:] == ["variant", "turn 4"]  # of case 2 there is no trained record
    assert [line[3:] for line in asked.lines] == [
        ["base", "1.00 [0.21, 1.00] of 1"],
        ["base", "0.00 [0.00, 0.66] of 2"],
        ["trained", "0.50 [0.09, 0.91] of 2"],
    ]
    corrected = tables["answers about corrected facts"]
    assert corrected.header[4:] == ["newest value", "outdated value", "neither"]
    assert [cell[:4] for cell in corrected.lines[0][4:]] == ["0.00", "0.50", "0.50"]
    assert [line[3:] for line in tables["KiB of keys and values after each turn"].lines] == [
        ["base", "1", "2", "3"],
        ["base", "1", "2", "2"],
        ["trained", "1", "2", "2"],
    ]
    assert section.paragraphs


def test_records_without_turns_have_no_section() -> None:
    plain = record(0, "base", 1.0)
    del plain["turn"], plain["turns_since"]
    section = over_turns(sorted_records([plain]))
    assert not section.tables and not section.paragraphs


def test_distances_are_columns_of_their_own() -> None:
    records = [record(0, "base", 1.0), record(1, "base", 0.0, turn=6, turns_since=5)]
    [by_turn, by_distance, *_] = over_turns(sorted_records(records)).tables
    assert by_turn.header[4:] == ["turn 4", "turn 6"] and by_distance.header[4:] == ["1 before", "5 before"]
    figure = turns_figure(sorted_records(records))
    assert figure is not None and figure.axes[0].get_lines()[0].get_xydata().tolist() == [[1.0, 1.0], [5.0, 0.0]]
    assert turns_figure(sorted_records(records[:1])) is None
