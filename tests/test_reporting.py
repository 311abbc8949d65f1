"""The report: its numbers, its files, its table."""

import csv
import io
import json
import math
import platform

import numpy as np
import pytest
import torch
from rich.console import Console

from sparsekv_pl import reporting
from sparsekv_pl.reporting import Row, perplexity_interval, terminal_table, wilson_interval, write_report

ENVIRONMENT = {"python": "3.11", "devices": ["cpu"]}


def accuracy_row(press="SnapKVPress", ratio=0.5, seen=True, before=12, after=61, cases=64):
    return Row(
        press,
        ratio,
        seen,
        "needle_accuracy",
        before / cases,
        after / cases,
        wilson_interval(before, cases),
        wilson_interval(after, cases),
        cases,
    )


def perplexity_row(press="SnapKVPress", ratio=0.5, seen=True):
    return Row(press, ratio, seen, "perplexity", 25.0, 22.9, (23.1, 26.9), (21.0, 24.8), 24)


@pytest.fixture
def rows():
    settings = [("SnapKVPress", 0.5, True), ("TOVAPress", 0.5, False), ("full cache", 0.0, False)]
    return [make(*setting) for setting in settings for make in (accuracy_row, perplexity_row)]


def rendered(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


# By definition, not by the formula: the bounds are the roots of (share - p)^2 = z^2 p (1 - p) / n.
@pytest.mark.parametrize(("successes", "cases"), [(0, 50), (3, 64), (32, 64), (50, 50), (1, 1)])
def test_wilson_bounds_solve_the_defining_equation(successes, cases):
    low, high = wilson_interval(successes, cases)
    share = successes / cases
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / cases, abs=1e-7)


def test_wilson_known_value_and_confidence():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # a textbook's value
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    narrow, wide = wilson_interval(5, 10, 0.5), wilson_interval(5, 10, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


@pytest.mark.parametrize(("successes", "cases"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_impossible_counts(successes, cases):
    with pytest.raises(ValueError, match=f"{successes} successes in {cases} cases"):
        wilson_interval(successes, cases)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_intervals_refuse_a_confidence_that_is_no_probability(confidence):
    with pytest.raises(ValueError, match=f"confidence is {confidence}"):
        wilson_interval(1, 2, confidence)
    with pytest.raises(ValueError, match=f"confidence is {confidence}"):
        perplexity_interval([1.0], [1], confidence=confidence)


def test_perplexity_interval_is_seeded_and_weighs_windows_by_their_tokens():
    nll, tokens = [300.0, 310.0, 20.0, 40.0], [100, 100, 10, 10]
    low, high = perplexity_interval(nll, tokens, seed=3)
    assert (low, high) == perplexity_interval(nll, tokens, seed=3)
    assert low < math.exp(sum(nll) / sum(tokens)) < high
    assert perplexity_interval([200.0, 20.0], [100, 10]) == pytest.approx((math.exp(2), math.exp(2)))


def test_perplexity_interval_has_the_width_that_theory_gives():
    tokens = np.full(400, 10)
    nll = 30 + 2 * np.random.default_rng(0).standard_normal(400)  # per token: mean 3, deviation 0.2
    low, high = perplexity_interval(nll, tokens)
    half = 1.96 * nll.std() / 10 / math.sqrt(400)
    assert math.log(low) == pytest.approx(nll.mean() / 10 - half, abs=0.15 * half)
    assert math.log(high) == pytest.approx(nll.mean() / 10 + half, abs=0.15 * half)


@pytest.mark.parametrize(("nll", "tokens"), [([], []), ([1.0], [1, 2]), ([1.0, 2.0], [3, 0])])
def test_perplexity_interval_refuses_bad_windows(nll, tokens):
    with pytest.raises(ValueError, match="token_counts"):
        perplexity_interval(nll, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "bleu"}, "unknown metric"),
        ({"compression_ratio": 1.0}, r"must be in \[0, 1\)"),
        ({"compression_ratio": -0.1}, r"must be in \[0, 1\)"),
        ({"cases": 0}, "0 cases"),
        ({"after": None}, "or neither"),
        ({"before": math.nan}, "finite"),
        ({"after": math.inf}, "finite"),
        ({"after_interval": (20.0, math.inf)}, "finite"),
    ],
)
def test_row_refuses_what_cannot_be(change, message):
    good = {name: getattr(perplexity_row(), name) for name in Row.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Row(**{**good, **change})


def test_json_has_the_agreed_schema(tmp_path, rows):
    write_report(tmp_path, rows, {"steps": 110}, ENVIRONMENT)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["rows", "training", "environment"]
    assert report["training"] == {"steps": 110}
    assert report["environment"] == ENVIRONMENT
    assert len(report["rows"]) == len(rows)
    assert report["rows"][1] == {
        "press": "SnapKVPress",
        "compression_ratio": 0.5,
        "seen_in_training": True,
        "metric": "perplexity",
        "before": 25.0,
        "after": 22.9,
        "before_interval": [23.1, 26.9],
        "after_interval": [21.0, 24.8],
        "cases": 24,
    }


def test_csv_has_a_line_per_row_and_empty_cells_without_training(tmp_path, rows):
    untrained = Row("KnormPress", 0.3, False, "perplexity", 30.0, None, (28.0, 32.0), None, 24)
    write_report(tmp_path, [*rows, untrained], {}, ENVIRONMENT)
    lines = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert len(lines) == len(rows) + 1
    assert float(lines[0]["before"]) == 12 / 64
    assert float(lines[1]["after_interval_high"]) == 24.8
    assert lines[-1]["after"] == lines[-1]["after_interval_low"] == ""


def test_markdown_tells_scores_counts_training_and_environment(tmp_path, rows):
    write_report(tmp_path, rows, {"steps": 110, "presses": ["a|b"]}, ENVIRONMENT)
    text = (tmp_path / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| TOVA "))
    assert "| 0.50 | unseen | 0.19 -> 0.95<br>12/64 -> 61/64<br>0.11-0.30 -> 0.87-0.98 |" in line
    assert "| steps | 110 |" in text
    assert r'["a\|b"]' in text
    assert "| python | 3.11 |" in text


def test_picture_is_a_png_that_grows_with_the_settings(tmp_path, rows):
    from matplotlib.image import imread

    heights = []
    for number, some in enumerate((rows[:2], rows)):
        *_, path = write_report(tmp_path / str(number), some, {}, ENVIRONMENT)
        image = imread(path)
        assert image.std() > 0.01  # something is drawn
        heights.append(image.shape[0])
    assert heights[0] < heights[1]


def test_picture_draws_each_score_and_interval_within_zero_and_one(rows):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    reporting._draw(axes, [rows[0], None])
    before, after = (container.lines for container in axes.containers)
    assert before[0].get_xdata() == pytest.approx([12 / 64])
    assert after[0].get_xdata() == pytest.approx([61 / 64])
    (segment,) = after[2][0].get_segments()
    assert segment[:, 0] == pytest.approx(wilson_interval(61, 64))


def test_a_report_that_fails_leaves_the_earlier_one_whole(tmp_path, rows):
    paths = write_report(tmp_path, rows, {}, ENVIRONMENT)
    earlier = [path.read_bytes() for path in paths]
    with pytest.raises(TypeError):
        write_report(tmp_path, rows[:2], {"model": object()}, ENVIRONMENT)
    assert [path.read_bytes() for path in paths] == earlier
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # no temporary file left


def test_a_failing_write_leaves_no_temporary_file(tmp_path, rows):
    (tmp_path / "report.json").mkdir()  # a file cannot replace a directory
    with pytest.raises(OSError):
        write_report(tmp_path, rows, {}, ENVIRONMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_terminal_table_fits_80_columns_and_starts_with_the_full_cache():
    rows = [accuracy_row("ExpectedAttentionPress"), perplexity_row("ExpectedAttentionPress")]
    rows += [accuracy_row("TOVAPress", seen=False), accuracy_row("full cache", 0.0, False, 64, 64)]
    lines = [line.split() for line in rendered(terminal_table(rows)).splitlines()]
    presses = [line[0] for line in lines if line and line[0] in {"full", "ExpectedAttention", "TOVA"}]
    assert presses == ["full", "ExpectedAttention", "TOVA"]
    expected = ["ExpectedAttention", "0.50", "seen", "0.19", "->", "0.95", "25.00", "->", "22.90"]
    assert expected in lines
    assert ["12/64", "->", "61/64", "23.1-26.9", "->", "21.0-24.8"] in lines
    assert ["0.11-0.30", "->", "0.87-0.98"] in lines
    assert ["TOVA", "0.50", "unseen", "0.19", "->", "0.95", "-"] in lines


def test_terminal_table_without_training_has_no_arrow():
    row = Row("KnormPress", 0.3, False, "perplexity", 30.0, None, (28.0, 32.0), None, 24)
    body = rendered(terminal_table([row])).split("before -> after")[0]
    assert "30.00" in body
    assert "->" not in body


def test_duplicate_rows_and_no_rows_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=r"two rows for SnapKVPress at 0\.5, needle_accuracy"):
        terminal_table([*rows, rows[0]])
    with pytest.raises(ValueError, match="no rows"):
        write_report(tmp_path, [], {}, ENVIRONMENT)


def test_environment_names_versions_and_nothing_personal(tmp_path, rows):
    found = reporting.environment()
    assert found["python"] == platform.python_version()
    assert set(found["packages"]) == set(reporting.REPORTED_PACKAGES)
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"]
    assert set(found) == {"python", "platform", "cpu", "cpu_count", "devices", "packages"}
    write_report(tmp_path, rows, {}, found)
