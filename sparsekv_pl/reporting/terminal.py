"""The short table that a run prints at its end."""

from typing import TYPE_CHECKING

from sparsekv_pl.reporting.condition import marked
from sparsekv_pl.reporting.sections import shorten
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.reporting.summary import Row, Summary, headline

if TYPE_CHECKING:
    from rich.table import Table

METRICS = {"needle_accuracy": "needle accuracy", "perplexity": "perplexity"}


def terminal_table(summary: Summary) -> "Table":
    """Make a table for rich's console, full cache first: base -> trained above counts and 95 % intervals.

    All retrieval tasks are shown together; report.md lists each.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    measured = summary.measured
    rows = {(row.condition, row.metric): row for row in headline(summary.rows)}
    shown = {metric: name for metric, name in METRICS.items() if any(key[1] == metric for key in rows)}
    trained = "trained" in measured.variants
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.caption = "counts, 95 % intervals"
    if trained:
        table.caption = "base -> trained, counts, 95 % intervals; unseen: a press never trained with"
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
    """Lines of a cell: "0.05 -> 0.95", "3/64 -> 61/64" (accuracy only), "0.02-0.13 -> 0.87-0.98"."""
    sides = [(getattr(row, variant), getattr(row, f"{variant}_interval")) for variant in VARIANTS]
    known = [(value, span) for value, span in sides if value is not None and span is not None]
    if not known:
        return ["failed" if row.error else "-"]
    accuracy = row.metric == "needle_accuracy"
    scores = [f"{value:.2f}" for value, _ in known]
    counts = [f"{value * row.cases:.4g}/{row.cases}" for value, _ in known]
    spans = ["-".join(f"{bound:.{2 if accuracy else 1}f}" for bound in span) for _, span in known]
    return [" -> ".join(parts) for parts in ((scores, counts, spans) if accuracy else (scores, spans))]
