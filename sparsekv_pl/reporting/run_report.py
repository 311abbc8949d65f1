"""Writing the report of a run: JSON, CSV, one page in Markdown and HTML, and pictures."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from sparsekv_pl.reporting.analysis_page import Drawn, write_page
from sparsekv_pl.reporting.figures import RETENTION, curves_figure, dots_figure
from sparsekv_pl.reporting.file_formats import csv_bytes
from sparsekv_pl.reporting.heatmaps import needle_figures
from sparsekv_pl.reporting.length_curves import length_figure
from sparsekv_pl.reporting.memory_curves import memory_figure
from sparsekv_pl.reporting.memory_points import memory_points
from sparsekv_pl.reporting.page import Link
from sparsekv_pl.reporting.retention_curves import retention_figure
from sparsekv_pl.reporting.ruler_settings import ruler_figure
from sparsekv_pl.reporting.sections import report_sections
from sparsekv_pl.reporting.summary import Summary
from sparsekv_pl.reporting.turn_curves import turns_figure


def write_run(
    output: Path,
    summary: Summary,
    training: Mapping[str, object],
    environment: Mapping[str, object],
    title: str,
    figures: Mapping[str, Figure] | None = None,
    pages: Mapping[str, tuple[str, bytes]] | None = None,
) -> list[Path]:
    """Write a run's report into `output` and return the paths; see ``write_page``.

    report.json has "rows", "training", "environment", "title", "ledger", "stability" and, for several context lengths,
    "by_length": the rows of each. Further files: report.csv (the
    rows), cases.csv (every record, answers included), ledger.csv and stability.csv if measured, report.png and more
    pictures.

    A record of the summary is a dict per case, variant, press and ratio; one with "error" instead of measures becomes a
    separate line. ``training`` (training.json) is empty if nothing was trained. ``figures`` are further pictures:
    caption -> picture, such as sparsity_figure's; ``pages`` are further pages to link: file name -> (label, content).
    """
    pages = pages or {}
    drawn = {**_figures(summary), **{f"{_slug(alt)}.png": (alt, figure) for alt, figure in (figures or {}).items()}}
    lines = {"ledger": summary.ledger, "stability": summary.stability}
    files = {
        "report.csv": csv_bytes(_spread(row.flat()) for row in summary.rows),
        "cases.csv": csv_bytes(summary.records),
        **{name: page for name, (_, page) in pages.items()},
        **{f"{name}.csv": csv_bytes(some) for name, some in lines.items() if some},
    }
    rows = [row.aliased() for row in summary.rows]
    if len(summary.by_length) > 1:
        lines["by_length"] = [{"length": n} | row.aliased() for n, some in summary.by_length.items() for row in some]
    content = {"rows": rows, "training": training, "environment": environment, **lines}
    links = [Link(label, name) for name, (label, _) in pages.items()]
    sections = report_sections(summary, list(drawn), training, environment, links)
    return write_page(output, title, sections, content, drawn, files)


def _figures(summary: Summary) -> Drawn:
    rows = summary.rows
    drawn: dict[str, tuple[str, Figure]] = {"report.png": ("Scores by press and compression ratio", dots_figure(rows))}
    if any(row.retention_cases for row in rows):
        kept = [row for row in rows if row.retention_cases]
        drawn["retention.png"] = ("Retention by press and compression ratio", dots_figure(kept, RETENTION))
    retained = retention_figure(rows)
    if retained is not None:
        drawn["retention-curves.png"] = ("Retention over compression, by press", retained)
    memory = memory_figure(memory_points(rows, summary.ledger))
    if memory is not None:
        drawn["memory-curves.png"] = ("Scores over the bytes of keys and values", memory)
    longer = length_figure(summary.by_length)
    if longer is not None:
        drawn["retention-lengths.png"] = ("Retention over the context length, by press", longer)
    ruler = ruler_figure(summary.by_length)
    if ruler is not None:
        drawn["ruler.png"] = ("RULER by setting and press (needle accuracy in percent)", ruler)
    turns = turns_figure(summary.measured)
    if turns is not None:
        drawn["turns.png"] = ("Right answers over the turns since a fact was told, by press", turns)
    curves = curves_figure(rows)
    if curves is not None:
        drawn["curves.png"] = ("Scores over compression", curves)
    for press, figure in needle_figures(summary.measured):
        drawn[f"needles-{_slug(press)}.png"] = (f"Needles found by depth and length, {press}", figure)
    return drawn


def _slug(name: str) -> str:
    """A name as part of a file name: CriticalKV(SnapKV) -> criticalkv-snapkv."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _spread(row: Mapping[str, object]) -> dict[str, object]:
    """``row`` with each interval as two columns."""
    spread: dict[str, object] = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            low, high = value if isinstance(value, (tuple, list)) else (None, None)
            spread |= {f"{name}_low": low, f"{name}_high": high}
        else:
            spread[name] = value
    return spread
