"""Summarising records to the rows of a report: base against trained on the same cases, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.models.batch import TEXT
from sparsekv_pl.reporting.condition import FULL_CACHE, Condition
from sparsekv_pl.reporting.costs import Line, ledger_rows, stability_rows
from sparsekv_pl.reporting.intervals import Interval, paired_bootstrap, wilson_interval
from sparsekv_pl.reporting.sorted_records import ALL_RETRIEVAL, VARIANTS, Measured, Sides, sorted_records
from sparsekv_pl.storage.records import Record

ALIASES = {"base": "before", "trained": "after"}
"""Additional names of the variants in report.json, for readers of its first version."""
LOGGED = {"needle_accuracy": "exact"}
"""Metric -> its name in loggers, if different."""


@dataclass(frozen=True)
class Measure:
    """A score computed from two sums over cases: of a record's `value`, and of its `weight` (None: 1)."""

    name: str
    value: str
    weight: str | None = None
    of_mean: Callable[[NDArray[np.float64]], NDArray[np.float64]] = np.asarray

    def columns(self, records: Sequence[Record]) -> NDArray[np.float64]:
        """(cases, 2) contributions of each case to the two sums."""
        return np.array([(r[self.value], r[self.weight] if self.weight else 1.0) for r in records], np.float64)

    def scores(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores (..., S) from sums (..., 2 S)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.of_mean(sums[..., 0::2] / sums[..., 1::2])


NEEDLE_ACCURACY = Measure("needle_accuracy", "exact")
PERPLEXITY = Measure("perplexity", "nll", "tokens", np.exp)
RECALLED_WORDS = Measure("recalled_words", "recalled_nll", "recalled_tokens")
BESIDES = {
    "needle_accuracy": [Measure(name, name) for name in ("substring", "words", "f1", "rouge_l")],
    "perplexity": [Measure("kl", "kl", "tokens"), RECALLED_WORDS],
}
"""Main metric -> further scores of the same cases. KL (forward) and recalled words are in nats per token."""
GAPS = {"perplexity": [PERPLEXITY, RECALLED_WORDS]}
"""Main metric -> scores whose difference from the full cache's is given too."""


@dataclass(frozen=True)
class Row:
    """One metric of one task under one condition, base and trained on the same cases.

    Scores are fractions (needle_accuracy) or exp(nats per token) (perplexity); intervals are 95 %. `trained` is None
    if nothing was trained, `base` if the base was not measured, both if everything failed (`error`). `difference` is
    trained - base. Retention is a score divided by the full cache's, on the cases that both have: for perplexity 1 is
    best and more is worse. `cases` counts needles or text windows.
    """

    condition: Condition
    seen_in_training: bool
    metric: str
    base: float | None = None
    trained: float | None = None
    base_interval: Interval | None = None
    trained_interval: Interval | None = None
    cases: int = 0
    task: str = TEXT
    dropped: int = 0
    """Number of cases that only one variant has; they are not counted in `cases`."""
    difference: float | None = None
    difference_interval: Interval | None = None
    retention_base: float | None = None
    retention_trained: float | None = None
    retention_base_interval: Interval | None = None
    retention_trained_interval: Interval | None = None
    retention_difference: float | None = None
    retention_difference_interval: Interval | None = None
    retention_cases: int = 0
    error: str | None = None
    besides: dict[str, Any] = field(default_factory=dict)
    """Further scores of the same cases: "kl_base", "kl_base_interval", "kl_trained", ...; some less the full cache's:
    "recalled_words_gap_base", ..., "recalled_words_gap_difference" (trained - base), ...; "recalled_tokens"."""

    def flat(self) -> dict[str, Any]:
        """One column per value, as in report.csv."""
        fields = asdict(self)
        condition, besides = fields.pop("condition"), fields.pop("besides")
        return condition | fields | besides

    def point(self, x: float, name: str) -> tuple[float, float, float, float] | None:
        """``x``, the score ``name`` and the bounds of its interval (NaN without one), for curves; None without it."""
        value = getattr(self, name)
        return None if value is None else (x, value, *(getattr(self, f"{name}_interval") or (np.nan, np.nan)))

    def aliased(self) -> dict[str, Any]:
        """``flat`` with base and trained also under the names before and after, as in report.json."""
        flat = self.flat()
        spelled = {"_".join(ALIASES.get(word, word) for word in name.split("_")): name for name in flat}
        return flat | {alias: flat[name] for alias, name in spelled.items()}


@dataclass(frozen=True)
class Summary:
    """Summary of a run's records, computed once for page, pictures, terminal, CSV, JSON and loggers."""

    records: Sequence[Record]
    measured: Measured
    rows: Sequence[Row]
    ledger: Sequence[Line]
    stability: Sequence[Line]
    by_length: Mapping[int, Sequence[Row]]
    """The rows of each context length, in tokens; empty without lengths."""

    def scores(self) -> dict[str, float]:
        """Scores for loggers ("base_SnapKV_0-5_dense/exact"): of text, and of all retrieval tasks together."""
        found: dict[str, float | None] = {}
        for row in headline(self.rows):
            names = {LOGGED.get(row.metric, row.metric): "", **{m.name: f"{m.name}_" for m in BESIDES[row.metric]}}
            columns = row.flat()
            for variant in VARIANTS:
                place = f"{variant}_{row.condition.name}"
                found |= {f"{place}/{name}": columns.get(prefix + variant) for name, prefix in names.items()}
        return {name: value for name, value in found.items() if value is not None}


def summarised(records: Sequence[Record]) -> Summary:
    """Sort, summarise and bootstrap a run's records.

    Raises ValueError without records, for an unknown variant, and for a measure that is not finite.
    """
    measured = sorted_records(records)
    rows = summary_rows(measured)
    return Summary(records, measured, rows, ledger_rows(measured), stability_rows(measured), _by_length(records, rows))


def _by_length(records: Sequence[Record], rows: Sequence[Row]) -> dict[int, Sequence[Row]]:
    lengths = sorted({record["length"] for record in records if record.get("length") is not None and "case" in record})
    if len(lengths) < 2:
        return dict.fromkeys(lengths, rows)
    own = {length: [record for record in records if record.get("length") == length] for length in lengths}
    return {length: summary_rows(sorted_records(some)) for length, some in own.items()}


def summary_rows(measured: Measured) -> list[Row]:
    """A row per condition and task, full cache first. A condition with errors has rows for tasks without scores too."""
    return [
        _row(measured, condition, task)
        for condition in measured.conditions
        for task in measured.tasks
        if (condition, task) in measured.sides or condition in measured.errors
    ]


def headline(rows: Sequence[Row]) -> list[Row]:
    """The main rows of a run: text, and the only retrieval task or all of them together."""
    pooled = any(row.task == ALL_RETRIEVAL for row in rows)
    return [row for row in rows if row.metric == "perplexity" or not pooled or row.task == ALL_RETRIEVAL]


def _row(measured: Measured, condition: Condition, task: str) -> Row:
    main = PERPLEXITY if task == TEXT else NEEDLE_ACCURACY
    sides = measured.sides.get((condition, task), {})
    cases = _pairs(sides)
    error = measured.errors.get(condition)
    if sides and not cases:
        error = "; ".join(filter(None, [error, "no case was measured in both variants"]))
    retained = measured.full(condition, task) if condition.press != FULL_CACHE else {}
    pairs = [case for case in cases if all(case in retained.get(variant, {}) for variant in sides)]
    besides = {
        f"{measure.name}_{name}": value
        for measure in BESIDES[main.name]
        if cases and _all_have(measure, sides, cases)
        for name, value in _scores(measure, sides, cases).items()
    }
    for measure in GAPS.get(main.name, ()):
        if pairs and all(_all_have(measure, {v: of[v] for v in sides}, pairs) for of in (sides, retained)):
            besides |= _against_full(measure, sides, retained, pairs, np.subtract, f"{measure.name}_gap_")
    if any(name.startswith(RECALLED_WORDS.name) for name in besides):
        besides["recalled_tokens"] = sum(next(iter(sides.values()))[case]["recalled_tokens"] for case in cases)
    return Row(
        condition=condition,
        seen_in_training=condition in measured.seen,
        metric=main.name,
        cases=len(cases),
        task=task,
        dropped=len(set().union(*sides.values())) - len(cases),
        retention_cases=len(pairs),
        error=error,
        besides=besides,
        **(_scores(main, sides, cases) if cases else {}),
        **(_against_full(main, sides, retained, pairs, np.divide, "retention_") if pairs else {}),
    )


def _pairs(sides: Sides) -> list[str]:
    """The cases that every variant has, in order of first appearance."""
    first, *others = sides.values() or [{}]
    return [case for case in first if all(case in other for other in others)]


def _scores(measure: Measure, sides: Sides, cases: list[str]) -> dict[str, Any]:
    """Each variant's score and interval, and the paired difference if there are two."""
    records = {variant: [sides[variant][case] for case in cases] for variant in VARIANTS if variant in sides}
    columns = np.hstack([measure.columns(some) for some in records.values()])
    found = _with_difference(columns, measure.scores, "", list(records))
    for variant, some in records.items():
        values = {record[measure.value] for record in some}
        if measure.weight is None and values <= {0, 1}:  # a proportion gets Wilson's interval
            right = sum(int(record[measure.value]) for record in some)
            found[f"{variant}_interval"] = wilson_interval(right, len(some))
    return found


def _all_have(measure: Measure, sides: Sides, cases: list[str]) -> bool:
    return all(measure.value in side[case] for side in sides.values() for case in cases)


def _against_full(
    measure: Measure, sides: Sides, full: Sides, cases: list[str], compare: Callable[..., Any], prefix: str
) -> dict[str, Any]:
    """``compare`` of each variant's score and its own full cache's; each draw takes the same cases of all four."""
    variants = [variant for variant in VARIANTS if variant in sides]
    quartet = [side[variant] for side in (sides, full) for variant in variants]
    columns = np.hstack([measure.columns([side[case] for case in cases]) for side in quartet])

    def compared(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        scores = measure.scores(sums)
        found: NDArray[np.float64] = compare(scores[..., : len(variants)], scores[..., len(variants) :])
        return found

    return _with_difference(columns, compared, prefix, variants)


def _with_difference(
    columns: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    prefix: str,
    variants: list[str],
) -> dict[str, Any]:
    """`{prefix}base`, `{prefix}trained`, `{prefix}difference` and their intervals, for the given variants."""

    def with_difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        scores = statistic(sums)
        return np.concatenate([scores, scores[..., 1:] - scores[..., :1]], axis=-1)

    names = variants + ["difference"] * (len(variants) == 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = with_difference(columns.sum(axis=0))
    found: dict[str, Any] = {}
    for name, value, interval in zip(names, values, paired_bootstrap(columns, with_difference), strict=True):
        found[prefix + name] = float(value) if np.isfinite(value) else None
        found[f"{prefix}{name}_interval"] = interval if np.isfinite(value) else None
    return found
