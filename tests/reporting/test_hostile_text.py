"""Texts of models, servers and files in reports: no formula for a spreadsheet, no markup for Markdown or a terminal."""

import csv
import io
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.table import Table as TerminalTable

from sparsekv_pl.reporting.console import show, show_report
from sparsekv_pl.reporting.file_formats import csv_bytes
from sparsekv_pl.reporting.page import Section, Table, markdown

ROOT = Path(__file__).parents[2]
FORMULAS = ['=cmd|"/C calc"!A1', "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1"]
MARKUP = [
    *("[a](http://evil.example)", "![a](http://evil.example/x.png)", "[a][b] and [b]: http://evil.example", "a|b|c"),
    *(
        "<img src=x onerror=alert(1)>",
        "<http://evil.example>",
        "http://evil.example",
        "www.evil.example",
        "me@evil.example",
    ),
    *(
        "**bold** _em_ `code` ~~gone~~",
        "# heading",
        "> quotation",
        "- item",
        "1. item",
        "x\n\n# heading\n\n---\n",
        "===",
        "&lt;b&gt;",
    ),
    *("\\[a](http://evil.example)", "\\*a*", "$x$"),
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_executes_no_cell(text: str) -> None:
    row = {"answer": text, text: 1, "number": -1.5, "list": ["=1"]}
    cells = [cell for line in csv.reader(io.StringIO(csv_bytes([row]).decode(), newline="")) for cell in line]
    assert f"'{text}" in cells and "-1.5" in cells and '["=1"]' in cells
    assert not any(re.match(r"[=+@\s\uff1d]|-(?!1\.5$)", cell) for cell in cells)


@pytest.mark.parametrize("text", MARKUP)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    table = Table([text, "b"], [[text, "c"]], text)
    page = markdown(text, [Section(text, ["a.png"], [text], [table])], {"a.png": text})
    tokens = MarkdownIt().enable(["table", "strikethrough"]).parse(page)
    kinds = [token.type for token in tokens if token.type.endswith("_open")]
    cells = ["table_open", "thead_open", "tr_open", "th_open", "th_open", "tbody_open", "tr_open", "td_open", "td_open"]
    headings = ["heading_open", "heading_open"]
    assert kinds == [*headings, "paragraph_open", "paragraph_open", "paragraph_open", *cells]
    inside = [child for token in tokens for child in token.children or () if child.type not in ("text", "text_special")]
    assert [child.type for child in inside if child.content or child.type != "text"] == [
        "image",
        "strong_open",
        "strong_close",
    ]
    shown = ["".join(child.content for child in token.children or ()) for token in tokens if token.type == "inline"]
    assert {" ".join(text.split())} <= set(shown)
    assert not re.search(r"https?://|(?<!\\)@|www\.", page)  # GitHub makes links of these


def test_a_terminal_shows_a_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = TerminalTable("[/red] head", title="[/red] title")
    table.add_row("[/red] :smile: cell")
    show("[bold]x[/bold] [/red] :smile:", table)
    show_report([Path("output/[/red]/report.md")])
    printed = capsys.readouterr().out
    assert printed.startswith("[bold]x[/bold] [/red] :smile:\n")
    assert "[/red] head" in printed and "[/red] title" in printed and "[/red] :smile: cell" in printed
    assert printed.endswith("report: output/[/red]/report.md\n")
    show_report([Path("run/report.md"), Path("run/report.html"), Path("run/a.png"), Path("run/b.png")])
    assert capsys.readouterr().out == "report: run/report.html (beside it: report.md, 2 pictures)\n"


def test_nothing_else_prints_through_rich() -> None:
    sources = [path for name in ("sparsekv_pl", "callbacks", "data") for path in (ROOT / name).rglob("*.py")]
    assert len(sources) > 100
    makes = {path.name for path in sources if re.search(r"\bConsole\(|rich import print", path.read_text())}
    assert makes == {"console.py"}
