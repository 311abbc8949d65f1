"""Scores and the cache's size over the tokens that were read or written after the context."""

import math
from collections.abc import Callable, Iterator, Sequence

from sparsekv_pl.reporting.condition import marked
from sparsekv_pl.reporting.page import Section, Table
from sparsekv_pl.reporting.sorted_records import ALL_RETRIEVAL, Measured
from sparsekv_pl.storage.records import Record

TITLE = "Over the length read and written"
COLUMNS = 8
"""Most columns of a table; stretches beyond are joined, sizes between are left out."""
HEADS = ["press", "ratio", "prefill", "variant"]
Stretches = list[list[float]]
"""[units, sum of a score] of each stretch, in order."""


def over_length(measured: Measured) -> Section:
    """Return the section with its tables: perplexity of text, right words of answers, bytes of the cache."""
    found = [
        *_by_stretch(measured, "text_stretches", "perplexity, by tokens of the continuation", _perplexity),
        *_by_stretch(measured, "answer_stretches", "share of right words, by words of the expected answer", _share),
        *_sizes(measured),
    ]
    return Section(TITLE, tables=found)


def _lines(measured: Measured) -> Iterator[tuple[str, list[tuple[list[str], list[Record]]]]]:
    """Yield each task with the first cells and the records of its lines: a condition and a variant each."""
    for task in measured.tasks:
        if task != ALL_RETRIEVAL:
            yield (
                task,
                [
                    ([marked(one.press), f"{one.compression_ratio:.2f}", one.way, variant], list(cases.values()))
                    for one in measured.conditions
                    for variant, cases in measured.sides.get((one, task), {}).items()
                ],
            )


def _by_stretch(measured: Measured, column: str, caption: str, score: Callable[[float, float], str]) -> Iterator[Table]:
    for task, found in _lines(measured):
        sums = [
            (cells, _summed([record[column] for record in records if column in record])) for cells, records in found
        ]
        lines = [(cells, own) for cells, own in sums if own]
        ends = [end for end, _, _ in lines[-1][1]] if lines else []
        if len(ends) > 1:
            heads = [f"{first:,}-{last:,}" for first, last in zip([0, *ends], ends, strict=False)]
            body = [[*cells, *(score(units, total) for _, units, total in own)] for cells, own in lines]
            yield Table([*HEADS, *heads], body, f"{task}: {caption}")


def _summed(records: Sequence[Stretches]) -> list[tuple[int, float, float]]:
    """Return (end, units, sum) of each stretch over all cases, joined to at most ``COLUMNS``."""
    most = max(map(len, records), default=0)
    if not most:
        return []
    longest = max(records, key=len)
    each = -(-most // COLUMNS)
    found, end = [], 0
    for start in range(0, most, each):
        end += int(sum(units for units, _ in longest[start : start + each]))
        parts = [part for record in records for part in record[start : start + each]]
        found.append((end, sum(units for units, _ in parts), sum(total for _, total in parts)))
    return found


def _sizes(measured: Measured) -> Iterator[Table]:
    for task, found in _lines(measured):
        sizes = [(cells, _mean_sizes(records)) for cells, records in found]
        lines = [(cells, held) for cells, held in sizes if held]
        tokens = sorted({count for _, held in lines for count in held})
        shown = tokens[:: max(1, -(-len(tokens) // COLUMNS))]
        if len(shown) > 1:
            heads = [*HEADS, *(f"after {count:,}" for count in shown)]
            body = [[*cells, *(_kib(held.get(count)) for count in shown)] for cells, held in lines]
            yield Table(heads, body, f"{task}: KiB of keys and values after so many tokens behind the context")


def _mean_sizes(records: Sequence[Record]) -> dict[int, float]:
    """Return tokens -> mean bytes after them, over the cases that came so far."""
    found: dict[int, list[int]] = {}
    for record in records:
        for tokens, held in record.get("kv_bytes_over_tokens", ()):
            found.setdefault(tokens, []).append(held)
    return {tokens: sum(sizes) / len(sizes) for tokens, sizes in found.items()}


def _kib(held: float | None) -> str:
    return "-" if held is None else f"{held / 2**10:,.0f}"


def _perplexity(tokens: float, nll: float) -> str:
    return f"{math.exp(nll / tokens):.2f}" if tokens else "-"


def _share(words: float, right: float) -> str:
    return f"{right / words:.2f}" if words else "-"
