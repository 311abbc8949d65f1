"""The report of a run: its files, their content, and the page."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from sparsekv_pl.reporting import REPORTED_PACKAGES, environment, sparsity_figure, summarised, terminal_table, write_run

ENVIRONMENT = {"python": "3.11", "devices": ["cpu"]}
FAILURE = {
    "case": "text-512-None-0",
    "task": "text",
    "length": 512,
    "variant": "trained",
    "press": "CriticalKV(SnapKV)",
    "compression_ratio": 0.9,
    "prefill": "dense",
    "seen_in_training": False,
    "error": "RuntimeError: a|b <script>alert(1)</script>\n at line 3",
}


@pytest.fixture(scope="module")
def records(make_records):
    return [*make_records(depths=(0.0, 1.0), stability=True, seeds=2), FAILURE]


@pytest.fixture(scope="module")
def report(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    training = {"steps": 110, "presses": ["a|b"], "last": {"loss": 1.5}}
    paths = write_run(folder, summarised(records), training, ENVIRONMENT, "A run")
    assert sorted(paths) == sorted(folder.iterdir())
    return folder


def test_json_keeps_the_quickstarts_contract(report):
    content = json.loads((report / "report.json").read_text())
    assert content["training"]["steps"] == 110
    assert content["environment"] == ENVIRONMENT
    first, *_ = content["rows"]
    assert first["press"] == "full cache"
    for row in content["rows"]:
        assert row["metric"] in {"needle_accuracy", "perplexity"}
        if row["error"] is None:
            low, high = row["base_interval"]
            assert low <= row["base"] <= high
            assert row["trained"] is not None
            assert row["cases"] > 0
            assert row["difference"] == pytest.approx(row["trained"] - row["base"])
    seen = {row["press"]: row["seen_in_training"] for row in content["rows"]}
    assert seen == {"full cache": False, "SnapKV": True, "TOVA": False, "CriticalKV(SnapKV)": False}
    for row in content["rows"]:
        for name in [name for name in row if {"base", "trained"} & set(name.split("_"))]:
            assert row[name.replace("base", "before").replace("trained", "after")] == row[name]
    assert {"retention_before", "after_interval", "kl_before", "kl_after"} <= content["rows"][3].keys()
    assert [row["base"] for row in content["rows"] if row["error"]] == [None, None]
    assert content["ledger"][0]["kept_share"] == 1
    assert content["stability"]


def test_csvs_have_a_line_per_row_and_per_record(report, records):
    content = json.loads((report / "report.json").read_text())
    lines = list(csv.DictReader((report / "report.csv").open()))
    assert len(lines) == len(content["rows"])
    assert float(lines[2]["trained_interval_high"]) == content["rows"][2]["trained_interval"][1]
    cases = list(csv.DictReader((report / "cases.csv").open()))
    assert len(cases) == len(records)
    assert cases[0]["answers"] == '["4711"]'
    assert cases[-1]["error"] == FAILURE["error"]
    assert cases[-1]["exact"] == ""
    assert (report / "ledger.csv").exists()
    assert (report / "stability.csv").exists()


def test_markdown_tells_scores_markers_errors_and_cost(report):
    text = (report / "report.md").read_text()
    (line, *_) = [line for line in text.splitlines() if line.startswith("| TOVA | 0.50")]
    assert re.match(r"\| TOVA \| 0.50 \| unseen \| 0\.\d\d \[0\.\d\d, [01]\.\d\d\] \| ", line)
    assert "| SnapKV | 0.50 | seen |" in text
    assert re.search(r"^Full cache, niah_single_1, needle accuracy: 1\.00 \[.*trained - base: \+0\.00", text, re.M)
    failed = [line for line in text.splitlines() if line.startswith("| CriticalKV(SnapKV) | 0.90")]
    assert len(failed) >= 4  # retrieval, its other scores, text, ledger
    assert all(r"a\|b &lt;script>" in line for line in failed)
    assert "| steps | 110 |" in text
    assert "| last: loss | 1.5 |" in text
    assert "| python | 3.11 |" in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    assert {"report.png", "retention.png", "curves.png"} <= set(re.findall(r"!\[.*\]\((.*)\)", text))


def test_markdown_tables_are_whole(report):
    lines = (report / "report.md").read_text().splitlines()
    rules = [place for place, line in enumerate(lines) if line.startswith("| ---")]
    assert len(rules) >= 7
    for place in rules:
        assert lines[place - 2] == ""  # or a renderer takes the table for text
        table = lines[place - 1 :]
        table = table[: table.index("") if "" in table else None]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
        assert len(table) > 2


class Outside(HTMLParser):
    """Everything that a page would load, and its cells."""

    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "srcset", "data"}]


def test_html_holds_its_pictures_and_loads_nothing(report):
    page = Outside()
    text = (report / "report.html").read_text()
    page.feed(text)
    assert len(page.links) == len(list(report.glob("*.png")))
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert page.tags.count("table") == (report / "report.md").read_text().count("\n| ---")


def test_only_base_only_trained_only_hosted(make_records, tmp_path):
    for name, change in (
        ("base", {"variants": ("base",)}),
        ("trained", {"variants": ("trained",)}),
        ("text", {"tasks": ("text",), "ratios": (0.5,)}),
    ):
        write_run(tmp_path / name, summarised(make_records(seeds=1, depths=(0.5,), **change)), {}, ENVIRONMENT, name)
    base, trained = (json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("base", "trained"))
    assert {row["trained"] for row in base} == {row["base"] for row in trained} == {None}
    assert all(row["base"] is not None for row in base)
    assert "unseen" not in (tmp_path / "base" / "report.md").read_text().split("## How")[0]
    (case, *_) = make_records(tasks=("vt",))
    hosted = {k: v for k, v in case.items() if k not in {"kept_pairs", "kv_bytes", "freed"}} | {"press": "hosted M"}
    write_run(tmp_path / "hosted", summarised([hosted]), {}, ENVIRONMENT, "hosted")
    assert "| hosted M | 0.00 |" in (tmp_path / "hosted" / "report.md").read_text()
    assert not (tmp_path / "hosted" / "ledger.csv").exists()


def test_only_failures_still_make_a_report(tmp_path):
    write_run(tmp_path, summarised([FAILURE | {"error": "x" * 5_000}]), {}, ENVIRONMENT, "failed")
    text = (tmp_path / "report.md").read_text()
    assert "x" * 150 in text
    assert "x" * 300 not in text
    assert "x" * 5_000 in (tmp_path / "cases.csv").read_text()
    assert (tmp_path / "report.png").exists()


def test_further_pictures_are_in_the_page(make_records, tmp_path):
    figure = sparsity_figure({"coverage": [[0.1, 0.2]]})
    some = make_records(tasks=("text",), seeds=1, ratios=())
    paths = write_run(tmp_path, summarised(some), {}, ENVIRONMENT, "t", {"Sparsity (base)": figure})
    assert tmp_path / "sparsity-base.png" in paths
    assert "![Sparsity (base)](sparsity-base.png)" in (tmp_path / "report.md").read_text()


def test_a_report_that_fails_leaves_the_earlier_one_whole(make_records, tmp_path):
    some = make_records(tasks=("text",), seeds=1, ratios=(0.5,))
    paths = write_run(tmp_path, summarised(some), {}, ENVIRONMENT, "first")
    earlier = [path.read_bytes() for path in paths]
    with pytest.raises(TypeError):
        write_run(tmp_path, summarised(some), {"model": object()}, ENVIRONMENT, "second")
    assert [path.read_bytes() for path in paths] == earlier
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # no temporary file left


def rendered(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_terminal_table_fits_80_columns_and_starts_with_the_full_cache(make_records):
    records = make_records(presses=[("ExpectedAttention", True), ("TOVA", False)], ratios=(0.5,))
    text = rendered(terminal_table(summarised([*records, FAILURE])))
    lines = [line.split() for line in text.splitlines()]
    presses = [line[0] for line in lines if line and line[0] in {"full", "ExpectedAttention", "TOVA"}]
    assert presses == ["full", "ExpectedAttention", "TOVA"]
    (expected,) = [line for line in lines if line[:3] == ["ExpectedAttention", "0.50", "seen"]]
    assert re.fullmatch(r"0\.\d\d -> [01]\.\d\d \d\d\.\d\d -> \d\d\.\d\d", " ".join(expected[3:]))
    assert "12/12 -> 12/12" in text
    assert "unseen" in " ".join(next(line for line in lines if line[:1] == ["TOVA"]))
    assert "failed" in text
    assert "RuntimeError" in text


def test_terminal_table_has_recalled_words_below_perplexity(make_records):
    records = [
        record | ({"recalled_nll": 4.0, "recalled_tokens": 2} if record["task"] == "text" else {})
        for record in make_records(presses=[("ExpectedAttention", True)], ratios=(0.5,))
    ]
    text = rendered(terminal_table(summarised(records)))
    assert text.count("recalled 2.00 -> 2.00") == 2 and "2.00-2.00 -> 2.00-2.00" in text


def test_terminal_table_without_training_has_no_arrow(make_records):
    text = rendered(terminal_table(summarised(make_records(variants=("base",), tasks=("text",)))))
    assert "->" not in text
    assert "seen" not in text
    assert "needle" not in text


def test_environment_names_versions_and_nothing_personal():
    import platform

    import torch

    found = environment()
    assert found["python"] == platform.python_version()
    assert set(found["packages"]) == set(REPORTED_PACKAGES)
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"]
    assert set(found) == {"python", "platform", "cpu", "cpu_count", "devices", "packages"}
