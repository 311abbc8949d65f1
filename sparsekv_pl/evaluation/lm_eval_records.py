"""lm_eval's results as records and as the terminal's table."""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from sparsekv_pl.evaluation.lm_eval_views import answer_of
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.storage.records import Record

if TYPE_CHECKING:
    from sparsekv_pl.evaluation.lm_eval_model import ContextEviction

EXACT = ("exact_match", "acc")
"""lm_eval's metrics that are 0 or 1 per document. The paired comparison uses the first that a task has."""

Evictions = Mapping[str, Sequence["ContextEviction"]]
"""``PressedLM.evictions``: the first argument of a request -> the outcomes of its evictions."""


def score_records(results: Mapping[str, Any], evictions: Evictions) -> Iterator[Record]:
    """Yield a record per task, filter and metric of ``simple_evaluate``'s results, groups included.

    Its columns: ``value`` and ``stderr`` (None if lm_eval gives none), ``n`` (documents), ``contexts`` and how many of
    them were ``evicted``, ``context_tokens`` and ``kept_pairs`` (means over contexts; pairs left of those the press
    saw), ``freed``.
    """
    met = [eviction for found in evictions.values() for eviction in found]
    left = {
        "contexts": len(met),
        "evicted": sum(eviction.evicted for eviction in met),
        "context_tokens": fmean(eviction.tokens for eviction in met),
        "kept_pairs": fmean(eviction.kept_pairs for eviction in met),
        "freed": all(eviction.freed for eviction in met),
    }
    for task, values in (results["results"] | results.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                yield {
                    "task": _task(task, filtered),
                    "metric": metric,
                    "value": _finite(value),
                    "stderr": _finite(values.get(f"{metric}_stderr,{filtered}")),
                    "n": values.get("sample_len"),
                    **left,
                }


def case_records(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    evictions: Evictions,
    viewed: Container[tuple[str, int]] = (),
) -> Iterator[Record]:
    """Yield a record per task, filter and document, with ``exact`` if the task has a metric of ``EXACT``.

    Those of ``viewed`` documents also have the model's ``answer``.
    """
    for task, documents in samples.items():
        for sample in documents:
            texts = {arguments[0] for arguments in sample["arguments"]}
            met = [eviction for text in texts for eviction in evictions.get(text, [])]
            record: Record = {
                "case": case_name(task, sample),
                "task": _task(task, sample["filter"]),
                "length": round(fmean(eviction.tokens for eviction in met)) if met else 0,
                "depth": None,
                "seed": 0,
            }
            right = [sample[metric] for metric in EXACT if isinstance(sample.get(metric), (int, float))]
            if right:
                record["exact"] = float(right[0])
            if (task, sample["doc_id"]) in viewed and (answer := answer_of(sample)):
                record["answer"] = answer
            yield record


def table(records: Sequence[Record]) -> Table:
    """Make a table of base and trained with lm_eval's standard errors: a row per task, metric, press and ratio.

    Failures follow at the end.
    """
    variants = [name for name in ("base", "trained") if any(record["variant"] == name for record in records)]
    titles = ("task", "metric", "press", "ratio", *variants, "documents", "contexts evicted")
    shown = Table(*(Column(title, overflow="fold") for title in titles))  # a narrow terminal cuts nothing off
    rows: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        if "case" not in record:
            condition = Condition.of(record)
            where = (condition.press, f"{condition.compression_ratio:g}", condition.way)
            rows.setdefault((record["task"], record.get("metric", ""), *where), {})[record["variant"]] = record
    for (task, metric, press, ratio, way), found in rows.items():
        measured = [record for record in found.values() if "metric" in record]
        counts = [str(measured[0]["n"]), f"{measured[0]['evicted']} of {measured[0]['contexts']}"] if measured else []
        name = press if way == "dense" else f"{press}, {way}"
        shown.add_row(task, metric, name, ratio, *(_cell(found.get(variant)) for variant in variants), *counts)
    return shown


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if "error" in record:
        return f"failed: {record['error']}"
    spread = "" if record["stderr"] is None else f" ± {record['stderr']:.4f}"
    return "-" if record["value"] is None else f"{record['value']:.4f}{spread}"


def case_name(task: str, sample: Mapping[str, Any]) -> str:
    """A document's name in reports."""
    return f"{_task(task, sample['filter'])}/{sample['doc_id']}"


def _task(task: str, filtered: str) -> str:
    """A task's name in reports: each of its filters counts as a task."""
    return task if filtered == "none" else f"{task}, {filtered}"


def _finite(value: Any) -> float | None:
    """``value`` as a float; None for lm_eval's "N/A" and for a perplexity that overflowed."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
