"""Scores by the turn of a conversation that asks, and by the turns since the answer was told; bytes after each turn."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sparsekv_pl.reporting.condition import FULL_CACHE, Condition, marked
from sparsekv_pl.reporting.intervals import wilson_interval
from sparsekv_pl.reporting.over_length import HEADS
from sparsekv_pl.reporting.page import Section, Table
from sparsekv_pl.reporting.sorted_records import ALL_RETRIEVAL, Measured
from sparsekv_pl.storage.records import Record

TITLE = "Over the turns of a conversation"
NOTE = (
    "Shares of right answers (exact) with Wilson's 95 % interval and the number of cases. The press evicts after every "
    "turn and has not seen the question. A corrected fact was told with another value in an earlier turn; its distance "
    "counts from the correction, and the outdated value is a wrong answer."
)
Cases = dict[tuple[Condition, str], list[Record]]
"""(condition, variant) -> records of questions at the end of conversations."""


def over_turns(measured: Measured) -> Section:
    """Return the section; empty if no record has a ``turn``."""
    cases = turn_cases(measured)
    tables = [
        *_shares(cases, "turn", "turn {}", "right answers by the turn that asks"),
        *_shares(cases, "turns_since", "{} before", "right answers by the turns since the fact was told or corrected"),
        *_corrected(cases),
        *_sizes(cases),
    ]
    return Section(TITLE, tables=tables, paragraphs=[NOTE] if tables else [])


def turn_cases(measured: Measured) -> Cases:
    """Collect the records with a ``turn``; with two variants, those of cases that both have."""
    found: Cases = {}
    for condition in measured.conditions:
        for task in measured.tasks:
            sides = measured.sides.get((condition, task), {}) if task != ALL_RETRIEVAL else {}
            both = set.intersection(*(set(cases) for cases in sides.values())) if sides else set()
            for variant, cases in sides.items():
                records = [record for name, record in cases.items() if name in both and "turn" in record]
                found.setdefault((condition, variant), []).extend(records)
    return {where: records for where, records in found.items() if records}


def grouped(records: Iterable[Record], column: str) -> dict[int, list[float]]:
    """Return value of ``column`` -> the ``exact`` scores of its records, by rising value."""
    found: dict[int, list[float]] = {}
    for record in sorted(records, key=lambda record: record[column]):
        found.setdefault(record[column], []).append(record["exact"])
    return found


def _shares(cases: Cases, column: str, head: str, caption: str) -> Iterator[Table]:
    values = sorted({record[column] for records in cases.values() for record in records})

    def cells(_condition: Condition, records: Sequence[Record]) -> list[str]:
        groups = grouped(records, column)
        return [_share(groups.get(value, [])) for value in values]

    yield from _table(cases, [head.format(value) for value in values], cells, caption)


def _corrected(cases: Cases) -> Iterator[Table]:
    corrected = {where: [record for record in records if "stale" in record] for where, records in cases.items()}

    def cells(_condition: Condition, records: Sequence[Record]) -> list[str]:
        newest, stale = [record["exact"] for record in records], [record["stale"] for record in records]
        neither = [1 - max(pair) for pair in zip(newest, stale, strict=True)]
        return [_share(newest), _share(stale), _share(neither)]

    kept = {where: records for where, records in corrected.items() if records}
    yield from _table(kept, ["newest value", "outdated value", "neither"], cells, "answers about corrected facts")


def _sizes(cases: Cases) -> Iterator[Table]:
    def sizes(condition: Condition, record: Record) -> Sequence[float]:
        if condition.press == FULL_CACHE:
            return [record["kv_bytes"] * turn for turn in range(1, record["turn"])]
        return record.get("kv_bytes_over_turns", ())

    turns = max((len(sizes(where[0], record)) for where, records in cases.items() for record in records), default=0)

    def cells(condition: Condition, records: Sequence[Record]) -> list[str]:
        held = [sizes(condition, record) for record in records]
        after = [[own[turn] for own in held if len(own) > turn] for turn in range(turns)]
        return [f"{sum(some) / len(some) / 2**10:,.0f}" if some else "-" for some in after]

    caption = "KiB of keys and values after each turn (full cache: those after the first turn times the turns)"
    yield from _table(cases, [f"turn {turn + 1}" for turn in range(turns)], cells, caption)


def _table(
    cases: Mapping[tuple[Condition, str], Sequence[Record]],
    heads: Sequence[str],
    cells: Callable[[Condition, Sequence[Record]], list[str]],
    caption: str,
) -> Iterator[Table]:
    if cases and heads:
        lines = [
            [marked(one.press), f"{one.compression_ratio:.2f}", one.way, variant, *cells(one, records)]
            for (one, variant), records in cases.items()
        ]
        yield Table([*HEADS, *heads], lines, caption)


def _share(scores: Sequence[float]) -> str:
    if not scores:
        return "-"
    low, high = wilson_interval(round(sum(scores)), len(scores))
    return f"{sum(scores) / len(scores):.2f} [{low:.2f}, {high:.2f}] of {len(scores)}"
