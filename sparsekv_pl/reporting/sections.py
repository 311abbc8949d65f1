"""Sections of a report in order: plain text, tables, and the names of pictures."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from sparsekv_pl.reporting.condition import FULL_CACHE, marked
from sparsekv_pl.reporting.cost_tables import LEDGER_NOTE, STABILITY_NOTE, ledger_tables, stability_tables
from sparsekv_pl.reporting.intervals import Interval
from sparsekv_pl.reporting.memory_points import MEMORY_NOTE, best_tables, memory_points
from sparsekv_pl.reporting.over_length import over_length
from sparsekv_pl.reporting.over_turns import over_turns
from sparsekv_pl.reporting.page import Link, Section, Table, shorten
from sparsekv_pl.reporting.ruler_settings import not_judged
from sparsekv_pl.reporting.sorted_records import VARIANTS, Measured
from sparsekv_pl.reporting.summary import BESIDES, Row, Summary, headline

WHOLE = "whole"
"""A cell of the column "pairs" where they are not quantised."""
METRIC_NAMES = {
    "needle_accuracy": "needle accuracy",
    "perplexity": "continuation perplexity",
    "substring": "substring",
    "words": "words",
    "f1": "token F1",
    "rouge_l": "ROUGE-L",
    "kl": "KL to the own full cache (nats per token)",
    "recalled_words": "recalled words (nats per token)",
    "recalled_words_gap": "recalled words, minus the own full cache's (nats per token)",
    "perplexity_gap": "continuation perplexity, minus the own full cache's",
}
HOW_TO_READ = (
    "The compression ratio is the fraction of the KV cache removed. Base and trained share their cases; a case that "
    "only one of them has is dropped. Brackets hold 95 % intervals: Wilson's for a share of right answers, otherwise "
    "a percentile bootstrap that draws cases with replacement, the same draw for base, trained and both full caches "
    "(B. Efron, Annals of Statistics 7 (1979), 1-26). An interval without width says only that no case differed.",
    "Retention is the score divided by that of the same model's full cache on the same cases: 1 means nothing is lost; "
    "for perplexity, above 1 is worse. A press is unseen if training never evicted with it.",
    "Recalled words are words of at least 4 letters of the text after the eviction that stood in the context, and "
    "neither in the 64 tokens before them nor earlier in that text: only the context can tell them.",
)
VIEWS_NOTE = (
    "Pages of single cases, which show the share of layers and heads that kept each token, and the answers. A case is "
    "an example; the tables have the measurement."
)
COSTS = ("steps", "seconds", "tokens", "trainable_parameters")


def report_sections(
    summary: Summary,
    pictures: Sequence[str],
    training: Mapping[str, object],
    environment: Mapping[str, object],
    views: Sequence[Link] = (),
) -> list[Section]:
    """All sections of a report that have content."""
    measured, rows, ledger, stability = summary.measured, summary.rows, summary.ledger, summary.stability
    best = best_tables(memory_points(rows, ledger), measured.variants)
    retrieval = [row for row in rows if row.metric == "needle_accuracy"]
    text = [row for row in rows if row.metric == "perplexity"]
    sections = [
        Section("Full cache", paragraphs=[*full_cache_lines(rows), *not_judged(summary.by_length)]),
        Section("At a glance", pictures),
        Section("Retrieval", tables=[*_by_task(measured, retrieval, scores_table), *other_scores(measured, retrieval)]),
        Section("Retrieval by length", tables=list(_by_length(summary))),
        Section("What the cache kept, token by token", paragraphs=[VIEWS_NOTE] if views else [], links=views),
        Section("Text", tables=_text(measured, text)),
        over_length(measured),
        over_turns(measured),
        Section("How to read this", paragraphs=HOW_TO_READ),
        Section("At less memory", tables=best, paragraphs=[MEMORY_NOTE] if best else []),
        Section("Budget ledger", tables=ledger_tables(ledger), paragraphs=[LEDGER_NOTE] if ledger else []),
        Section("Stability", tables=stability_tables(stability), paragraphs=[STABILITY_NOTE] if stability else []),
        Section("Training cost", tables=_facts(training, first=COSTS)),
        Section("Environment", tables=_facts(environment)),
    ]
    return [section for section in sections if section.paragraphs or section.tables or section.pictures]


def full_cache_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence per task with the full cache's scores: what training costs if nothing is evicted."""
    for row in rows:
        if row.condition.press != FULL_CACHE or not row.cases:
            continue
        name = f"{row.task}, {METRIC_NAMES[row.metric]}"
        if row.condition.prefill != "dense":
            name += f", {row.condition.prefill}"
        known = [(getattr(row, variant), getattr(row, f"{variant}_interval")) for variant in VARIANTS]
        scores = [score(value, span) for value, span in known if value is not None]
        change = ""
        if row.difference is not None:
            change = f"; trained - base: {score(row.difference, row.difference_interval, sign=True)}"
        yield f"Full cache, {name}: {' -> '.join(scores)}{change}, {row.cases} cases{_dropped(row)}."


def score(value: float | None, span: Interval | None = None, sign: bool = False, digits: int = 2) -> str:
    """Format a score and its interval: 0.95 and (0.9, 1.0) -> "0.95 [0.90, 1.00]"; "-" for None."""
    if value is None:
        return "-"
    form = f"{{:{'+' * sign}.{digits}f}}"
    return form.format(value) + (f" [{', '.join(form.format(bound) for bound in span)}]" if span else "")


def _dropped(row: Row) -> str:
    return f" ({row.dropped} dropped: not in both)" if row.dropped else ""


def _fewer(row: Row) -> str:
    return f" (retention: {row.retention_cases})" if 0 < row.retention_cases < row.cases else ""


def _by_task(
    measured: Measured, rows: Sequence[Row], table: Callable[[Measured, Sequence[Row]], Table | None]
) -> list[Table]:
    tables = [table(measured, [row for row in rows if row.task == task]) for task in measured.tasks]
    return [one for one in tables if one is not None]


def scores_table(measured: Measured, rows: Sequence[Row]) -> Table | None:
    """The main score of one task: base, trained, difference and retention."""
    if not rows:
        return None
    names = [*(measured.variants or ["base"]), *["difference"] * (len(measured.variants) == 2)]
    heads = [*names[:2], *["trained - base"] * (len(names) == 3)]
    columns = [*names, *(f"retention_{name}" for name in names)]
    lines = [[*(_cell(row, name) for name in columns), f"{row.cases}{_dropped(row)}{_fewer(row)}"] for row in rows]
    caption = f"{rows[0].task}: {METRIC_NAMES[rows[0].metric]}"
    return _table(measured, caption, rows, [*heads, *(f"retention, {head}" for head in heads), "cases"], lines)


def _by_length(summary: Summary) -> Iterator[Table]:
    """The main scores of each context length, if there are several."""
    for length, rows in summary.by_length.items() if len(summary.by_length) > 1 else ():
        needles = [row for row in headline(rows) if row.metric == "needle_accuracy"]
        table = scores_table(summary.measured, needles)
        if table is not None:
            yield replace(table, caption=f"{table.caption}, {length:,} tokens")


def _cell(row: Row, name: str) -> str:
    return score(getattr(row, name), getattr(row, f"{name}_interval"), sign=name.endswith("difference"))


def _text(measured: Measured, rows: Sequence[Row]) -> list[Table]:
    """The tables of plain text."""
    names = ("perplexity_gap", "kl")
    tables = [_of_text(measured, rows, name) for name in names]
    return [*_by_task(measured, rows, scores_table), *filter(None, tables), *recalled_tables(measured, rows)]


def recalled_tables(measured: Measured, rows: Sequence[Row]) -> list[Table]:
    """The tables of recalled words: their scores, and the gap to the full cache's."""
    tables = (_of_text(measured, rows, name) for name in ("recalled_words", "recalled_words_gap"))
    return [table for table in tables if table is not None]


def _of_text(measured: Measured, rows: Sequence[Row], name: str) -> Table | None:
    """One of the further scores of text: base, trained and difference."""
    known = [row for row in rows if any(f"{name}_{variant}" in row.besides for variant in VARIANTS)]
    if not known:
        return None
    both = len(measured.variants) == 2
    heads = [*measured.variants, *["trained - base"] * both]
    names = [f"{name}_{variant}" for variant in [*measured.variants, *["difference"] * both]]
    tokens = name == "recalled_words"
    shown = [row for row in rows if row in known or row.error]
    lines = [
        [*(_fine(row, one) for one in names), *[str(row.besides.get("recalled_tokens", "-"))] * tokens] for row in shown
    ]
    return _table(measured, f"{rows[0].task}: {METRIC_NAMES[name]}", shown, [*heads, *["tokens"] * tokens], lines)


def _fine(row: Row, name: str) -> str:
    return score(row.besides.get(name), row.besides.get(f"{name}_interval"), digits=3)


def other_scores(measured: Measured, rows: Sequence[Row]) -> list[Table]:
    """Substring, words, F1 and ROUGE-L of all tasks, base -> trained."""
    names = [measure.name for measure in BESIDES["needle_accuracy"]]
    names = [name for name in names if any(f"{name}_{variant}" in row.besides for row in rows for variant in VARIANTS)]
    if not names:
        return []
    lines = []
    for row in rows:
        pairs = [[row.besides.get(f"{name}_{variant}") for variant in VARIANTS] for name in names]
        cells = [" -> ".join(score(value) for value in pair if value is not None) or "-" for pair in pairs]
        lines.append([row.task, *cells])
    heads = ["task", *(METRIC_NAMES[name] for name in names)]
    caption = "Other scores of the same answers" + ", base -> trained" * (len(measured.variants) == 2)
    return [_table(measured, caption, rows, heads, lines)]


def _table(
    measured: Measured, caption: str, rows: Sequence[Row], heads: list[str], cells: Sequence[Sequence[str]]
) -> Table:
    """A table with press, ratio, prefill if it differs, "seen" or "unseen" if trained, `cells`, and errors if any."""
    prefills = len({condition.prefill for condition in measured.conditions}) > 1
    stored = any(condition.stored for condition in measured.conditions)
    trained = "trained" in measured.variants
    failed = any(row.error for row in rows)
    ways = [*["prefill"] * prefills, *["pairs"] * stored]
    header = ["press", "ratio", *ways, *["in training"] * trained, *heads, *["error"] * failed]
    lines = [
        [
            marked(row.condition.press),
            f"{row.condition.compression_ratio:.2f}",
            *[row.condition.prefill] * prefills,
            *[row.condition.stored or WHOLE] * stored,
            *[measured.training_word(row.condition)] * trained,
            *line,
            *[shorten(row.error)] * failed,
        ]
        for row, line in zip(rows, cells, strict=True)
    ]
    return Table(header, lines, caption)


def _facts(facts: Mapping[str, object], first: Sequence[str] = ()) -> list[Table]:
    """A table of names and values, those in `first` on top; nested names are joined as "outer: inner"."""
    flat: dict[str, object] = {}
    for name in [*(name for name in first if name in facts), *(name for name in facts if name not in first)]:
        value = facts[name]
        inner = {f"{name}: {key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
        flat |= inner
    lines = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in flat.items()]
    return [Table(["what", "value"], lines)] if lines else []
