"""Writing the report of a run: JSON, CSV, one page in Markdown and HTML, and pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekv_pl.reporting.figures import RETENTION, curves_figure, dots_figure, png
from sparsekv_pl.reporting.file_formats import csv_bytes, json_bytes, replace_all
from sparsekv_pl.reporting.heatmaps import needle_figures
from sparsekv_pl.reporting.page import Link, Picture, html, markdown
from sparsekv_pl.reporting.retention_curves import retention_figure
from sparsekv_pl.reporting.sections import report_sections
from sparsekv_pl.reporting.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = dict[str, tuple[str, "Figure"]]
"""File name -> (caption, picture)."""


def write_run(
    output: Path,
    summary: Summary,
    training: Mapping[str, object],
    environment: Mapping[str, object],
    title: str,
    figures: "Mapping[str, Figure] | None" = None,
    pages: Mapping[str, tuple[str, bytes]] | None = None,
) -> list[Path]:
    """Write a run's report into `output` and return the paths.

    Files: report.json ({"rows", "training", "environment", "title", "ledger", "stability"}), report.csv (the rows),
    cases.csv (every record, answers included), ledger.csv and stability.csv if measured, report.md, report.html (which
    embeds its pictures), report.png and further pictures. Everything is rendered before anything is written, and each
    file is replaced in one step: a report that fails leaves the earlier one intact.

    Parameters
    ----------
    output
        Folder; made if missing.
    summary
        Summary of the records: one dict per case, variant, press and ratio. A record with "error" instead of measures
        becomes a separate line.
    training
        The training's settings and cost (training.json); empty if nothing was trained.
    environment
        Hardware, versions and settings of the run.
    title
        Heading of the page.
    figures
        Further pictures for the page: caption -> picture, such as sparsity_figure's.
    pages
        Further pages to link: file name -> (label, content).
    """
    pages = pages or {}
    drawn = _figures(summary) | {f"{_slug(alt)}.png": (alt, figure) for alt, figure in (figures or {}).items()}
    images = {name: png(figure) for name, (_, figure) in drawn.items()}
    links = [Link(label, name) for name, (label, _) in pages.items()]
    pictures = [Picture(name, alt) for name, (alt, _) in drawn.items()]
    sections = report_sections(summary, pictures, training, environment, links)
    lines = {"ledger": summary.ledger, "stability": summary.stability}
    rows = [row.aliased() for row in summary.rows]
    content = {"rows": rows, "training": training, "environment": environment, "title": title, **lines}
    files = {
        "report.json": json_bytes(content),
        "report.csv": csv_bytes(_spread(row.flat()) for row in summary.rows),
        "report.md": markdown(title, sections).encode(),
        "report.html": html(title, sections, images).encode(),
        "cases.csv": csv_bytes(summary.records),
        **{name: page for name, (_, page) in pages.items()},
        **{f"{name}.csv": csv_bytes(some) for name, some in lines.items() if some},
    }
    return replace_all(output, files | images)


def _figures(summary: Summary) -> Drawn:
    rows = summary.rows
    drawn: Drawn = {"report.png": ("Scores by press and compression ratio", dots_figure(rows))}
    if any(row.retention_cases for row in rows):
        kept = [row for row in rows if row.retention_cases]
        drawn["retention.png"] = ("Retention by press and compression ratio", dots_figure(kept, RETENTION))
    retained = retention_figure(rows)
    if retained is not None:
        drawn["retention-curves.png"] = ("Retention over compression, by press", retained)
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
