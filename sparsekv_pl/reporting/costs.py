"""Tables over the records: cost and kept pairs of every condition, and the stability of retained importance."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.sorted_records import ALL_RETRIEVAL, Measured
from sparsekv_pl.storage.records import Record

Line = dict[str, Any]
STABILITY = {
    "min_retained": "min",
    "mean_retained": "min",
    "retained_variance": "max",
    "overlap_prompts": "min",
    "overlap_steps": "min",
}
"""Measure of stability -> which of its values is the worst."""


def ledger_rows(measured: Measured) -> list[Line]:
    """A line per press, ratio, prefill and context length, base and trained together.

    Its columns: ``kept_pairs`` (mean KV pairs kept per layer and KV head), ``kept_share`` (of the context's tokens),
    ``kv_bytes`` (mean bytes of KV allocated per case), ``peak_bytes`` (peak memory), tokens per second over all cases,
    and ``memory``: "freed", "only masked", "freed or masked" if cases differ, None if nothing was evicted.
    """

    def line(condition: Condition, found: pd.DataFrame) -> Line:
        length = int(found["length"].iloc[0])
        kept = _mean(found, "kept_pairs")
        return {
            "length": length,
            "measured": len(found),
            "kept_pairs": kept,
            "kept_share": None if kept is None else kept / length,
            "kv_bytes": _mean(found, "kv_bytes"),
            "peak_bytes": _of(found, "peak_bytes", "max"),
            "prefill_tokens_per_second": _rate(found, "length", "prefill_seconds"),
            "eviction_seconds": _mean(found, "eviction_seconds"),
            "decode_tokens_per_second": _rate(found, "decode_tokens", "decode_seconds"),
            "memory": _memory(condition, found),
        }

    return _lines(measured, ["length"], line, needs="kept_pairs")


def stability_rows(measured: Measured) -> list[Line]:
    """A line per press, ratio, prefill and variant: the mean over cases, and the worst case.

    DefensiveKV (https://arxiv.org/abs/2510.13334) argues for the worst case: a good mean does not prevent failures.
    """

    def line(condition: Condition, found: pd.DataFrame) -> Line:  # noqa: ARG001
        measures: Line = {"variant": found["variant"].iloc[0], "measured": len(found)}
        for name, worst in STABILITY.items():
            measures |= {name: _mean(found, name), f"{name}_worst": _of(found, name, worst)}
        return measures

    return _lines(measured, ["variant"], line, needs="min_retained")


def _lines(
    measured: Measured, by: list[str], line: Callable[[Condition, pd.DataFrame], Line], needs: str
) -> list[Line]:
    """A line per condition and group of its records that have the measure `needs`, and one per failure.

    Empty if no record has the measure.
    """
    lines: list[Line] = []
    found_any = False
    for condition in measured.conditions:
        head = condition.columns()
        records = [record for record in _records(measured, condition) if needs in record]
        found_any = found_any or bool(records)
        groups = pd.DataFrame(records).groupby(by, sort=True) if records else []
        lines += [head | line(condition, found) for _, found in groups]
        if condition in measured.errors:
            lines.append(head | {"error": measured.errors[condition]})
    return lines if found_any else []


def _records(measured: Measured, condition: Condition) -> list[Record]:
    tasks = [task for task in measured.tasks if task != ALL_RETRIEVAL]
    return [
        record
        for task in tasks
        for side in measured.sides.get((condition, task), {}).values()
        for record in side.values()
    ]


def _of(found: pd.DataFrame, name: str, how: str) -> float | None:
    if name not in found or found[name].isna().all():
        return None
    return float(found[name].astype(float).agg(how))


def _mean(found: pd.DataFrame, name: str) -> float | None:
    return _of(found, name, "mean")


def _rate(found: pd.DataFrame, tokens: str, seconds: str) -> float | None:
    """Tokens per second over the records that have both."""
    if tokens not in found or seconds not in found:
        return None
    known = found[[tokens, seconds]].dropna().astype(float).sum()
    return float(known[tokens] / known[seconds]) if known[seconds] > 0 else None


def _memory(condition: Condition, found: pd.DataFrame) -> str | None:
    if "freed" not in found or not condition.evicts:
        return None
    freed = set(found["freed"].dropna().astype(bool))
    return {(True,): "freed", (False,): "only masked"}.get(tuple(freed), "freed or masked")
