"""The short table that a run prints at its end."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from sparsekv_pl.reporting.condition import marked
from sparsekv_pl.reporting.intervals import Interval
from sparsekv_pl.reporting.page import shorten
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.reporting.summary import Row, Summary, headline

METRICS = {"needle_accuracy": "needle accuracy", "perplexity": "perplexity"}


def terminal_table(summary: Summary) -> Table:
    """Make a table for rich's console, full cache first: base -> trained above counts and 95 % intervals.

    All retrieval tasks are shown together; report.md lists each.
    """
    measured = summary.measured
    rows = {(row.condition, row.metric): row for row in headline(summary.rows)}
    shown = {metric: name for metric, name in METRICS.items() if any(key[1] == metric for key in rows)}
    trained = "trained" in measured.variants
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.caption = "counts, 95 % intervals"
    if trained:
        table.caption = "base -> trained, counts, 95 % intervals; unseen: a press never trained with"
    if any("recalled_tokens" in row.besides for row in rows.values()):
        table.caption += "; recalled: nats per token of recalled words"
    for name in ("press", "ratio", *[""] * trained, *shown.values()):
        table.add_column(name)
    for condition in measured.conditions:
        found = [rows.get((condition, metric)) for metric in shown]
        lines = [_lines(row) if row else ["-"] for row in found]
        texts = [Text.assemble(first, ("\n" + "\n".join(rest), "dim")) for first, *rest in lines]
        cell = Text.assemble(marked(condition.press), (f"\n{condition.when}" * bool(condition.when), "dim"))
        if condition in measured.errors:
            cell.append(f"\n{shorten(measured.errors[condition])}", "red")
        seen = [measured.training_word(condition)] * trained
        table.add_row(cell, f"{condition.compression_ratio:.2f}", *seen, *texts, end_section=True)
    return table


def _lines(row: Row) -> list[str]:
    """Lines of a cell: "0.05 -> 0.95", "3/64 -> 61/64" (accuracy only), "0.02-0.13 -> 0.87-0.98"; of text also the
    recalled words: "recalled 3.91 -> 3.20", "3.61-4.22 -> 2.90-3.51".
    """
    accuracy = row.metric == "needle_accuracy"
    sides = [(getattr(row, variant), getattr(row, f"{variant}_interval")) for variant in VARIANTS]
    scores, *spans = _sides(sides, digits=2 if accuracy else 1)
    counts = [f"{value * row.cases:.4g}/{row.cases}" for value, span in sides if value is not None and span is not None]
    if scores == "-" and row.error:
        return ["failed"]
    return [scores, *[" -> ".join(counts)] * (accuracy and bool(counts)), *spans, *_recalled(row)]


def _recalled(row: Row) -> list[str]:
    names = [f"recalled_words_{variant}" for variant in VARIANTS]
    scores, *spans = _sides([(row.besides.get(name), row.besides.get(f"{name}_interval")) for name in names], digits=2)
    return [f"recalled {scores}", *spans] if spans else []


def _sides(sides: Sequence[tuple[float | None, Interval | None]], digits: int) -> list[str]:
    """The scores of base and trained, and their intervals with so many digits; "-" if there are none."""
    known = [(value, span) for value, span in sides if value is not None and span is not None]
    scores = [f"{value:.2f}" for value, _ in known]
    spans = ["-".join(f"{bound:.{digits}f}" for bound in span) for _, span in known]
    return [" -> ".join(scores), " -> ".join(spans)] if known else ["-"]
