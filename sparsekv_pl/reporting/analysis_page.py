"""Writing the report of an analysis: one page in Markdown and HTML, pictures, JSON and CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsekv_pl.reporting.file_formats import json_bytes, replace_all
from sparsekv_pl.reporting.page import Section, Table, html, markdown
from sparsekv_pl.reporting.plots import png

Drawn = Mapping[str, tuple[str, Figure]]
"""File name ending in .png -> (caption, picture)."""


def write_analysis(
    output: Path,
    title: str,
    sections: Sequence[Section],
    content: Mapping[str, Any],
    environment: Mapping[str, object],
    figures: Drawn,
    files: Mapping[str, bytes],
) -> list[Path]:
    """Write a page with the environment as its last section; see ``write_page``. Returns the paths.

    ``content`` is that of report.json beside "title" and "environment". Pictures that no section names go to the first.
    """
    named = {name for section in sections for name in section.pictures}
    first, *others = sections
    first = replace(first, pictures=[*first.pictures, *(name for name in figures if name not in named)])
    facts = Table(["", ""], [[name, str(value)] for name, value in environment.items()])
    page = [first, *others, Section("Environment", tables=[facts])]
    return write_page(output, title, page, {**content, "environment": dict(environment)}, figures, files)


def write_page(
    output: Path,
    title: str,
    sections: Sequence[Section],
    content: Mapping[str, Any],
    figures: Drawn,
    files: Mapping[str, bytes],
) -> list[Path]:
    """Write report.md, report.html (which embeds its pictures), report.json and further files; return the paths.

    Everything is rendered before anything is written, and each file is replaced in one step: a report that fails leaves
    the earlier one intact. ``output`` is made if missing; ``content`` is JSON-able and finite.
    """
    images = {name: png(figure) for name, (_, figure) in figures.items()}
    captions = {name: caption for name, (caption, _) in figures.items()}
    return replace_all(
        output,
        {
            "report.json": json_bytes({"title": title, **content}),
            "report.md": markdown(title, sections, captions).encode(),
            "report.html": html(title, sections, captions, images).encode(),
            **files,
            **images,
        },
    )
