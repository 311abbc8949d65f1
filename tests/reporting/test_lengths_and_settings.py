"""Several context lengths and RULER's settings: tables, retention over length, heat maps, what is not judged."""

import json

import numpy as np
import pytest

from sparsekv_pl.reporting.length_curves import length_figure
from sparsekv_pl.reporting.plots import png
from sparsekv_pl.reporting.ruler_settings import not_judged, ruler_figure
from sparsekv_pl.reporting.run_report import write_run
from sparsekv_pl.reporting.summary import summarised

LENGTHS = (1024, 2048, 4096)
SETTINGS = ("niah_single_2", "niah_multikey_1", "vt", "text")


@pytest.fixture(scope="module")
def summary(make_records):
    """Settings lose more with the length; nothing finds "vt" at 4,096 tokens."""
    records = make_records(tasks=SETTINGS, lengths=LENGTHS, seeds=8, ratios=(0.75,))
    for record in records:
        if record["task"] == "vt" and record["length"] == 4096:
            record |= {"exact": 0.0, "substring": 0.0}
    return summarised(records)


def test_each_length_has_the_rows_of_its_own_cases(summary):
    assert list(summary.by_length) == list(LENGTHS)
    found: dict[tuple, list[float]] = {}
    for record in summary.records:
        if record["variant"] == "trained" and record["task"] != "text":
            key = record["length"], record["task"], record["press"], record["compression_ratio"]
            found.setdefault(key, []).append(record["exact"])
    checked = {
        (length, row.task, row.condition.press, row.condition.compression_ratio): row.trained
        for length, rows in summary.by_length.items()
        for row in rows
        if row.task in SETTINGS[:3]
    }
    assert checked == pytest.approx({key: np.mean(values) for key, values in found.items()})


def test_retention_over_length_has_a_plot_per_press_and_one_of_the_full_cache(summary):
    figure = length_figure(summary.by_length)
    assert [axes.get_title() for axes in figure.axes] == ["full cache: accuracy", "SnapKV 0.75", "TOVA 0.75 *"]
    for axes, press, field in zip(
        figure.axes, ("full cache", "SnapKV", "TOVA"), ("", *["retention_"] * 2), strict=True
    ):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1024", "2048", "4096"]
        for line in axes.get_lines():
            expected = [
                getattr(row, field + line.get_label())
                for rows in summary.by_length.values()
                for row in rows
                if (row.task, row.condition.press) == ("all retrieval", press)
            ]
            assert line.get_ydata() == pytest.approx(expected)
    assert png(figure)


def test_ruler_has_a_map_per_length_with_frames_where_training_changed_more_than_chance(summary):
    figure = ruler_figure(summary.by_length)
    maps = [axes for axes in figure.axes if (axes.images and axes.get_title()) or axes.get_ylabel() == "trained"]
    assert [axes.get_title() for axes in maps][:3] == ["1,024 tokens", "2,048 tokens", "4,096 tokens"]
    below = figure.axes[3:6]
    for axes, rows in zip(below, summary.by_length.values(), strict=True):
        judged = [row for row in rows if row.task in SETTINGS[:3] and max(row.base or 0, row.trained or 0) > 0]
        better = [row for row in judged if row.besides["substring_difference_interval"][0] > 0]
        assert sum(box.get_edgecolor()[:3] == (1, 1, 1) for box in axes.patches) == len(better)
        assert len(axes.texts) == 3 * 3
    assert any(axes.patches for axes in below)
    assert png(figure)


def test_ruler_is_judged_by_its_own_score(make_records):
    """Answers that list all values and begin one more are right in RULER, and no exact match."""
    records = make_records(tasks=("niah_multivalue", "niah_multiquery"), lengths=(1024,), ratios=(0.75,))
    for record in records:
        record |= {"exact": 0.0, "substring": float(record["task"] == "niah_multivalue")}
    summary = summarised(records)
    [said] = not_judged(summary.by_length)
    assert "in niah_multiquery (0.00 -> 0.00): not judged" in said
    assert {text.get_text() for axes in ruler_figure(summary.by_length).axes for text in axes.texts} == {"0", "100"}


def test_a_setting_that_the_full_cache_cannot_do_is_named(summary):
    assert list(not_judged(summary.by_length)) == [
        "RULER at 4,096 tokens: the full cache scores below 0.2 in vt (0.00 -> 0.00): not judged."
    ]


def test_the_report_has_tables_and_pictures_of_lengths(summary, tmp_path):
    write_run(tmp_path, summary, {}, {}, "Longer")
    page = (tmp_path / "report.md").read_text()
    assert "all retrieval: needle accuracy, 4,096 tokens" in page
    assert "not judged" in page
    for name in ("retention-lengths.png", "ruler.png"):
        assert (tmp_path / name).stat().st_size > 5_000
        assert name in page
    by_length = json.loads((tmp_path / "report.json").read_text())["by_length"]
    assert {row["length"] for row in by_length} == set(LENGTHS)


def test_one_length_or_one_setting_has_no_such_picture(make_records):
    summary = summarised(make_records(tasks=("niah_single_2", "text")))
    assert length_figure(summary.by_length) is None
    assert ruler_figure(summary.by_length) is None
    assert not list(not_judged(summary.by_length))
    text = summarised(make_records(tasks=("text",), lengths=LENGTHS))
    assert length_figure(text.by_length) is None
    hosted = summarised([record | {"length": None} for record in make_records(tasks=("niah_single_2",))])
    assert hosted.by_length == {}


def test_a_model_that_finds_nothing_has_a_picture_without_retention(make_records):
    records = make_records(tasks=SETTINGS[:1], lengths=LENGTHS, seeds=2, ratios=(0.75,))
    nothing = [record | {"exact": 0.0, "substring": 0.0} for record in records]
    figure = length_figure(summarised(nothing).by_length)
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 0, 0]
    assert png(figure)
