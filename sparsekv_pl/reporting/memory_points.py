"""Scores against memory: the bytes that each condition left, and the best condition at a share of the full cache's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from sparsekv_pl.reporting.condition import FULL_CACHE, Condition, foresees
from sparsekv_pl.reporting.costs import Line
from sparsekv_pl.reporting.page import Table
from sparsekv_pl.reporting.summary import Row, headline

TIMES = (16, 32)
"""Shares of memory for which the best condition is looked up: as many times less than the full cache's."""
MEMORY_NOTE = (
    "The condition with the most needles (in a tie, the lowest perplexity) among those whose keys and values take at "
    "most that share of the full cache's bytes, scales and minima of quantised pairs included; ceilings are left out. "
    "It is the best of those measured, chosen on these cases, so its score is a little too good."
)


@dataclass(frozen=True)
class MemoryPoint:
    """A condition's scores and bytes."""

    condition: Condition
    times_less: float
    """The full cache's bytes over this condition's, both for keys and values: a mean over context lengths."""
    needles: Row | None
    text: Row | None


def memory_points(rows: Sequence[Row], ledger: Sequence[Line]) -> list[MemoryPoint]:
    """Join the scores and the bytes of every condition that has both; ceilings are left out."""
    held: dict[Condition, dict[int, float]] = {}
    for line in ledger:
        if line.get("kv_bytes"):
            held.setdefault(Condition.of(line), {})[line["length"]] = line["kv_bytes"]
    full = next((lengths for condition, lengths in held.items() if condition.press == FULL_CACHE), {})
    scores: dict[Condition, dict[str, Row]] = {}
    for row in headline(rows):
        scores.setdefault(row.condition, {})[row.metric] = row
    return [
        MemoryPoint(condition, fmean(shares), own.get("needle_accuracy"), own.get("perplexity"))
        for condition, own in scores.items()
        if not foresees(condition.press)
        and (shares := [full[length] / kept for length, kept in held.get(condition, {}).items() if length in full])
    ]


def best_tables(points: Sequence[MemoryPoint], variants: Sequence[str]) -> list[Table]:
    """The best point of each variant at 16 and 32 times less memory; empty if none is that small."""
    lines = list(_best_lines(points, variants))
    if not lines:
        return []
    stored = any(point.condition.stored for point in points)
    header = ["at least", "model", "press", "ratio", *["pairs"] * stored, "times less", "needle accuracy", "perplexity"]
    return [Table(header, [_cells(line, stored) for line in lines])]


Best = tuple[int, str, MemoryPoint]


def _best_lines(points: Sequence[MemoryPoint], variants: Sequence[str]) -> Iterator[Best]:
    for times in TIMES:
        small = [point for point in points if point.times_less >= times]
        for variant in variants:
            known = [point for point in small if _score(point.needles, variant) is not None] or small
            if known:
                yield times, variant, min(known, key=lambda point: _rank(point, variant))


def _rank(point: MemoryPoint, variant: str) -> tuple[float, float]:
    needles, perplexity = _score(point.needles, variant), _score(point.text, variant)
    return -(needles or 0.0), float("inf") if perplexity is None else perplexity


def _score(row: Row | None, variant: str) -> float | None:
    return None if row is None else getattr(row, variant)


def _cells(best: Best, stored: bool) -> list[str]:
    times, variant, point = best
    condition, needles, perplexity = point.condition, _score(point.needles, variant), _score(point.text, variant)
    return [
        f"{times} times less",
        variant,
        condition.press + (f", {condition.prefill}" if condition.prefill != "dense" else ""),
        f"{condition.compression_ratio:g}",
        *[condition.stored or "whole"] * stored,
        f"{point.times_less:.1f}",
        "-" if needles is None else f"{needles:.2f}",
        "-" if perplexity is None else f"{perplexity:.2f}",
    ]
