"""Sorting a run's records by condition, task, variant and case, in a report's order."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sparsekv_pl.models.batch import TEXT
from sparsekv_pl.reporting.condition import FULL_CACHE, Condition
from sparsekv_pl.storage.records import Record

ALL_RETRIEVAL = "all retrieval"
"""Name of all retrieval tasks of a run together, if there are several."""
VARIANTS = ("base", "trained")

Sides = dict[str, dict[str, Record]]
"""variant -> case -> record."""


@dataclass
class Measured:
    """Every record of a run, by condition, task, variant and case."""

    conditions: list[Condition] = field(default_factory=list)
    """Full cache first, then presses in order of first appearance, with rising ratios."""
    tasks: list[str] = field(default_factory=list)
    """All retrieval tasks together if there are several, then each in order of first appearance, then text."""
    sides: dict[tuple[Condition, str], Sides] = field(default_factory=dict)
    seen: set[Condition] = field(default_factory=set)
    """Conditions whose press was used in training."""
    errors: dict[Condition, str] = field(default_factory=dict)
    """Condition -> its errors, and how often each occurred."""

    @property
    def variants(self) -> list[str]:
        """The variants that have a record, base first."""
        found = {variant for sides in self.sides.values() for variant in sides}
        return [variant for variant in VARIANTS if variant in found]

    def full(self, condition: Condition, task: str) -> Sides:
        """The full cache's records to compare this condition with: of the same prefill, else of a dense one."""
        full = [other for other in self.conditions if other.press == FULL_CACHE and (other, task) in self.sides]
        full.sort(key=lambda other: (other.prefill != condition.prefill, other.prefill != "dense"))
        return self.sides[full[0], task] if full else {}

    def training_word(self, condition: Condition) -> str:
        """ "seen" or "unseen" in training, "-" if nothing is evicted or the press is a ceiling."""
        return "-" if not condition.may_be_seen else "seen" if condition in self.seen else "unseen"


def sorted_records(records: Sequence[Record]) -> Measured:
    """Sort records; duplicates (cases repeated to even out ranks) count once.

    Raises ValueError without records, for an unknown variant, and for a measure that is not finite.
    """
    if not records:
        raise ValueError("no rows to report: evaluate at least one case")
    measured = Measured(conditions=_in_order([Condition.of(record) for record in records]))
    failures: dict[Condition, Counter[str]] = {}
    for record in records:
        condition = Condition.of(record)
        _check(record, condition)
        if record.get("seen_in_training"):
            measured.seen.add(condition)
        if "error" in record:
            where = f"{record.get('variant', 'base')}, {record.get('task', 'setting')}: {record['error']}"
            failures.setdefault(condition, Counter())[where] += 1
            continue
        sides = measured.sides.setdefault((condition, record["task"]), {})
        sides.setdefault(record["variant"], {})[f"{record['task']}/{record['case']}"] = record
    measured.errors = {condition: "; ".join(_counted(found)) for condition, found in failures.items()}
    tasks = list(dict.fromkeys(record["task"] for record in records if "task" in record))
    retrieval = [task for task in tasks if task != TEXT]
    if len(retrieval) > 1:
        measured.sides |= _together(measured, retrieval)
        retrieval = [ALL_RETRIEVAL, *retrieval]
    measured.tasks = retrieval + [TEXT] * (TEXT in tasks)
    return measured


def _in_order(met: list[Condition]) -> list[Condition]:
    presses = {name: place for place, name in enumerate(dict.fromkeys(condition.press for condition in met))}
    prefills = {name: place for place, name in enumerate(dict.fromkeys(condition.prefill for condition in met))}
    stored = {name: place for place, name in enumerate(dict.fromkeys(condition.stored for condition in met))}
    return sorted(
        set(met),
        key=lambda c: (
            c.press != FULL_CACHE,
            *(presses[c.press], prefills[c.prefill], stored[c.stored], c.compression_ratio),
        ),
    )


def _together(measured: Measured, tasks: list[str]) -> Iterator[tuple[tuple[Condition, str], Sides]]:
    for condition in measured.conditions:
        pooled: Sides = {}
        for task in tasks:
            for variant, cases in measured.sides.get((condition, task), {}).items():
                pooled.setdefault(variant, {}).update(cases)
        if pooled:
            yield (condition, ALL_RETRIEVAL), pooled


def _counted(failures: Counter[str]) -> Iterator[str]:
    for message, times in failures.items():
        yield " ".join(message.split()) + (f" ({times} times)" if times > 1 else "")


def _check(record: Record, condition: Condition) -> None:
    where = f"record of {record.get('case')!r} under {condition.label}"
    if record.get("variant") not in VARIANTS:
        raise ValueError(f"{where}: variant {record.get('variant')!r} must be one of {', '.join(VARIANTS)}")
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {name} is {value}; look for NaN in the model's outputs")
