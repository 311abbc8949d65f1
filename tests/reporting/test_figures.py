"""Pictures: their content, and unusual input."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from sparsekv_pl.reporting import sparsity_figure
from sparsekv_pl.reporting.figures import RETENTION, curves_figure, dots_figure
from sparsekv_pl.reporting.heatmaps import needle_figures, short_number
from sparsekv_pl.reporting.plots import caption, legend_above, plots, png
from sparsekv_pl.reporting.retention_curves import retention_figure
from sparsekv_pl.reporting.sorted_records import sorted_records
from sparsekv_pl.reporting.summary import summary_rows
from sparsekv_pl.reporting.training_curves import read_curves, training_figure, write_training_curves


def rows_of(records):
    return summary_rows(sorted_records(records))


def contrast_with_white(colour):
    """WCAG's contrast ratio; graphics need 3."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 1.05 / (np.dot([0.2126, 0.7152, 0.0722], channels) + 0.05)


def test_dots_draw_each_score_and_interval(make_records):
    rows = rows_of(make_records(presses=[("SnapKV", False)], ratios=(0.5,)))
    accuracy, perplexity = dots_figure(rows).axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["full cache", "SnapKV 0.50 *"]
    needles = [row for row in rows if row.metric == "needle_accuracy"]
    base, trained = (container.lines for container in accuracy.containers)
    assert base[0].get_xdata() == pytest.approx([row.base for row in needles])
    assert trained[0].get_xdata() == pytest.approx([row.trained for row in needles])
    (_, segment) = trained[2][0].get_segments()
    assert segment[:, 0] == pytest.approx(needles[1].trained_interval)
    assert "perplexity" in perplexity.get_title()


def test_retention_has_a_plot_per_press_and_the_ceiling_dashed(make_records):
    presses = [("SnapKV", True), ("TOVA", False), ("Oracle", False)]
    rows = rows_of(make_records(presses=presses, ratios=(0.5, 0.9), seeds=8))
    figure = retention_figure(rows)
    assert [axes.get_title() for axes in figure.axes] == ["SnapKV", "TOVA *"], "the ceiling has no plot of its own"
    needles = [row for row in rows if row.metric == "needle_accuracy"]
    ceiling = "ceiling (sees the question), trained"
    for axes, press in zip(figure.axes, ("SnapKV", "TOVA"), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for name, of, style in (("base", press, "-"), (ceiling, "Oracle", "--")):
            own = [row for row in needles if row.condition.press == of]
            assert lines[name].get_linestyle() == style
            assert lines[name].get_xdata().tolist() == [0, 0.5, 0.9]
            kept = [getattr(row, f"retention_{name.split()[-1]}") for row in own]
            assert lines[name].get_ydata() == pytest.approx([1, *kept])
        named = [line for name, line in lines.items() if not name.startswith("_")]
        looks = {(line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white") for line in named}
        assert len(looks) == len(named) == 4, "without colours"
        assert min(contrast_with_white(line.get_color()) for line in named) >= 3
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", ".5", ".9"]
    assert imread(io.BytesIO(png(figure)))[..., 3].min() == 1, "opaque, also on a dark page"
    assert retention_figure([row for row in rows if row.condition.press in ("Oracle", "full cache")]) is None
    assert retention_figure(rows_of(make_records(tasks=("text",)))) is None


def test_training_curves_are_those_of_the_events(tmp_path):
    with pytest.raises(ValueError, match="holds no TensorBoard events of a training"):
        write_training_curves(tmp_path)
    for start, value in ((0, 9.0), (2, 1.0)):  # the second is a resumed run, which repeats a step
        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(start, start + 3):
                for name in ("train/selection/Knorm", "train/selection/SnapKV", "val/perplexity_full", "hp_metric"):
                    writer.add_scalar(name, value + step, step)
                writer.add_scalar("val/kept_mass/Knorm", 0.25, step)
                writer.add_scalar("val/kept_mass_most/Knorm", 0.5 * (step != 1), step)
    curves = read_curves(tmp_path)
    steps, values = curves["train/selection/Knorm"]
    assert (steps.tolist(), values.tolist()) == ([0, 1, 2, 3, 4], [9, 10, 3, 4, 5])
    np.testing.assert_array_equal(curves["val/kept_mass of the most/Knorm"][1], [0.5, np.nan, 0.5, 0.5, 0.5])
    selection, reached, perplexity = training_figure(curves).axes
    assert reached.get_title() == "val/kept_mass of the most"
    assert [line.get_label() for line in selection.lines] == ["Knorm", "SnapKV"]
    assert perplexity.get_title() == "val/perplexity"
    assert write_training_curves(tmp_path).read_bytes()[:4] == b"\x89PNG"


def test_pictures_are_pngs_that_grow_with_the_conditions(make_records):
    heights = [
        imread(io.BytesIO(png(dots_figure(rows_of(make_records(ratios=ratios)))))).shape[0]
        for ratios in ((0.5,), (0.1, 0.3, 0.5, 0.7))
    ]
    assert heights[0] < heights[1]


def test_one_metric_has_one_plot_and_nothing_measured_is_said(make_records):
    rows = rows_of(make_records(tasks=("text",)))
    assert len(dots_figure(rows).axes) == 1
    assert len(dots_figure([row for row in rows if row.condition.press != "full cache"], RETENTION).axes) == 1
    failure = {"variant": "base", "press": "SnapKV", "compression_ratio": 0.9, "error": "Oops", "task": "text"}
    nothing = dots_figure(rows_of([failure]))
    assert [text.get_text() for text in nothing.texts] == ["nothing was measured"]
    assert curves_figure(rows_of([failure])) is None


def test_curves_begin_at_the_full_cache_base_dashed_and_trained_solid(make_records):
    rows = rows_of(make_records(presses=[("SnapKV", True)], ratios=(0.75, 0.5), tasks=("niah_single_1", "text")))
    accuracy, perplexity = curves_figure(rows).axes
    base, trained = accuracy.lines
    assert base.get_xdata().tolist() == [0, 0.5, 0.75]
    assert (base.get_linestyle(), trained.get_linestyle()) == ("--", "-")
    full, half, _ = (row for row in rows if row.metric == "needle_accuracy")
    assert trained.get_ydata()[:2].tolist() == [full.trained, half.trained]
    assert len(accuracy.collections) == 2  # a band for each
    assert perplexity.get_ylabel() == "perplexity"


def test_many_presses_are_distinguished(make_records):
    presses = [(f"Critical{number}(SnapKV)", False) for number in range(23)]
    figure = curves_figure(rows_of(make_records(presses=presses, ratios=(0.5,), tasks=("vt",), seeds=1)))
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 23


def test_needles_are_counted_by_depth_and_length(make_records):
    records = make_records(lengths=(512, 1024), depths=(0.0, 0.5), seeds=3, presses=[("SnapKV", True)], ratios=(0.5,))
    ((press, figure),) = needle_figures(sorted_records(records))
    assert press == "SnapKV"
    base_full, base_half, trained_full, trained_half, _ = figure.axes
    assert base_full.get_title() == "full cache"
    assert base_half.get_title() == "ratio 0.50"
    for axes, variant in ((base_half, "base"), (trained_half, "trained")):
        labels = {text.get_position(): text.get_text() for text in axes.texts}
        for (x, y), text in labels.items():
            where = {"length": (512, 1024)[x], "depth": (0.0, 0.5)[y], "variant": variant, "compression_ratio": 0.5}
            found = [r["exact"] for r in records if r["depth"] is not None and where.items() <= r.items()]
            assert text == f"{sum(found):g}/{len(found)}"
        assert len(labels) == 4
    assert trained_full.images[0].get_clim() == (0, 1)


def test_one_depth_and_one_length_have_no_heat_map_and_many_depths_are_tenths(make_records):
    assert not list(needle_figures(sorted_records(make_records(depths=(0.5,)))))
    assert not list(needle_figures(sorted_records(make_records(tasks=("text",)))))
    many = make_records(depths=tuple(np.linspace(0, 1, 41)), seeds=1)
    _, figure = next(needle_figures(sorted_records(many)))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"{low}-{low + 10}" for low in range(0, 100, 10)]


def test_sparsity_has_a_map_and_a_scale_per_measure():
    figure = sparsity_figure({"effective support (tokens)": np.eye(30, 9), "coverage": np.ones((30, 3))})
    support, coverage = figure.axes[:2]
    assert support.get_title() == "effective support (tokens)"
    assert support.images[0].get_array().shape == (30, 9)
    assert (coverage.get_xlabel(), coverage.get_ylabel()) == ("head", "layer")
    for wrong in ({}, {"a": np.ones(3)}, {"a": np.ones((0, 3))}):
        with pytest.raises(ValueError, match=r"\(layers, heads\)"):
            sparsity_figure(wrong)


@pytest.mark.parametrize(("number", "short"), [(384, "384"), (4096, "4096"), (50_000, "50k"), (10_000_000, "10M")])
def test_lengths_are_short(number, short):
    assert short_number(number) == short


@pytest.mark.parametrize("names", [["base"], ["base", "trained", "whole pairs", "8 bits", "4 bits", "x" * 40]])
def test_a_legend_fits_its_picture(names):
    figure, ((axes,),) = plots((4.6, 3.2))
    legend_above(figure, [axes.plot([0, 1], label=name)[0] for name in names])
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == names


@pytest.mark.parametrize("inches", [2.0, 4.0, 10.0])
def test_a_caption_fits_its_picture(inches):
    figure, _ = plots((inches, 3.0))
    words = "frames: trained above (white) or below (red) base by more than chance; faded: the full cache is below 0.2"
    caption(figure, words)
    png(figure)
    (text,) = (artist for artist in figure.texts if artist.get_text())
    box = text.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert text.get_text().replace("\n", " ") == words
