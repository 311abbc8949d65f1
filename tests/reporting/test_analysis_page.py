"""The report of an analysis: files, places of pictures, and a failed report leaves the earlier one intact."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sparsekv_pl.reporting import write_analysis
from sparsekv_pl.reporting.page import Section, Table

SECTIONS = [
    Section("Findings", paragraphs=["Something <was> found."], tables=[Table(["a"], [["1"]])]),
    Section("More", pictures=["named.png"]),
]
FIGURES = {"loose.png": ("a loose picture", Figure()), "named.png": ("a named picture", Figure())}


def test_the_files_of_a_report(tmp_path: Path) -> None:
    paths = write_analysis(
        tmp_path, "Title", SECTIONS, {"rows": [1]}, {"device": "cpu"}, FIGURES, {"rows.csv": b"a\n1\n"}
    )
    assert {path.name for path in paths} == {
        "report.md", "report.html", "report.json", "rows.csv", "loose.png", "named.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "title": "Title",
        "rows": [1],
        "environment": {"device": "cpu"},
    }
    text = (tmp_path / "report.md").read_text()
    assert text.index("loose.png") < text.index("## More") < text.index("named.png") < text.index("## Environment")
    assert "| device | cpu |" in text
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 2


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_analysis(tmp_path, "Title", SECTIONS[:1], {}, {}, {}, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        write_analysis(tmp_path, "Other", SECTIONS[:1], {"value": float("nan")}, {}, {}, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
