"""Writing the report of an analysis: one page in Markdown and HTML, pictures, JSON and CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv_pl.reporting.figures import png
from sparsekv_pl.reporting.file_formats import json_bytes, replace_all
from sparsekv_pl.reporting.page import Picture, Section, Table, html, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_analysis(
    output: Path,
    title: str,
    sections: Sequence[Section],
    content: Mapping[str, Any],
    environment: Mapping[str, object],
    figures: "Mapping[str, tuple[str, Figure]] | None" = None,
    files: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Write report.md, report.html (which embeds its pictures), report.json and further files; return the paths.

    Everything is rendered before anything is written, and each file is replaced in one step.

    Parameters
    ----------
    output
        Folder; made if missing.
    title
        Heading of the page.
    sections
        Sections of the page. Pictures that no section names go to the first one.
    content
        Content of report.json, added to "title" and "environment"; JSON-able and finite.
    environment
        Hardware, versions and settings of the run; also the page's last section.
    figures
        File name ending in .png -> (caption, picture).
    files
        Further files: name -> content.
    """
    figures = figures or {}
    named = {picture.name for section in sections for picture in section.pictures}
    loose = [Picture(name, alt) for name, (alt, _) in figures.items() if name not in named]
    first, *others = sections
    facts = Table(["", ""], [[name, str(value)] for name, value in environment.items()])
    page = [replace(first, pictures=[*first.pictures, *loose]), *others, Section("Environment", tables=[facts])]
    images = {name: png(figure) for name, (_, figure) in figures.items()}
    return replace_all(
        output,
        {
            "report.md": markdown(title, page).encode(),
            "report.html": html(title, page, images).encode(),
            "report.json": json_bytes({"title": title, **content, "environment": dict(environment)}),
            **(files or {}),
            **images,
        },
    )
