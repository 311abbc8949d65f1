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


def _by_stretch(measured: Measured, column: str, caption: str, score: Callable[[float, float], str]) -> Iterator[Table]:
    for task in measured.tasks:
        lines: list[tuple[list[str], list[tuple[float, float]]]] = []
        ends: list[int] = []
        for condition in measured.conditions if task != ALL_RETRIEVAL else ():
            for variant, cases in measured.sides.get((condition, task), {}).items():
                own = _summed([record[column] for record in cases.values() if column in record])
                if own:
                    cells = [marked(condition.press), f"{condition.compression_ratio:.2f}", condition.prefill, variant]
                    lines.append((cells, [(units, total) for _, units, total in own]))
                    ends = [end for end, _, _ in own]
        if lines and len(ends) > 1:
            heads = [f"{first:,}-{last:,}" for first, last in zip([0, *ends], ends, strict=False)]
            body = [[*cells, *(score(units, total) for units, total in sums)] for cells, sums in lines]
            yield Table(["press", "ratio", "prefill", "variant", *heads], body, f"{task}: {caption}")


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
    for task in measured.tasks:
        lines: dict[tuple[str, ...], dict[int, float]] = {}
        for condition in measured.conditions if task != ALL_RETRIEVAL else ():
            for variant, cases in measured.sides.get((condition, task), {}).items():
                held = _mean_sizes(list(cases.values()))
                if held:
                    cells = (marked(condition.press), f"{condition.compression_ratio:.2f}", condition.prefill, variant)
                    lines[cells] = held
        tokens = sorted(set().union(*lines.values())) if lines else []
        shown = tokens[:: max(1, -(-len(tokens) // COLUMNS))]
        if len(shown) > 1:
            heads = ["press", "ratio", "prefill", "variant", *(f"after {count:,}" for count in shown)]
            body = [[*cells, *(_kib(held.get(count)) for count in shown)] for cells, held in lines.items()]
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
