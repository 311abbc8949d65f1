"""Right answers over the turns since a fact was told, a plot per press and ratio: base and trained."""

from typing import TYPE_CHECKING

import numpy as np

from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.intervals import wilson_interval
from sparsekv_pl.reporting.over_turns import Cases, grouped, turn_cases
from sparsekv_pl.reporting.plots import caption, draw_band, legend_above, plain, plots_for, whole_numbers
from sparsekv_pl.reporting.sorted_records import VARIANTS, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def turns_figure(measured: Measured) -> "Figure | None":
    """Draw the share of right answers (exact) with 95 % bands; the first plot is the full cache.

    None if no question stands in a conversation, or all are asked equally long after their fact was told.
    """
    cases = turn_cases(measured)
    if len({record["turns_since"] for records in cases.values() for record in records}) < 2:
        return None
    conditions = list(dict.fromkeys(condition for condition, _ in cases))
    figure, grid = plots_for(len(conditions), (3.3, 2.5), 0.7)
    for axes, condition in zip(grid, conditions, strict=True):
        _draw(axes, cases, condition)
    handles = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    named = [handles[variant] for variant in VARIANTS if variant in handles]
    legend_above(figure, named)
    caption(figure, "turns since the fact was told or corrected")
    figure.supylabel("right answers", fontsize=9)
    return figure


def _draw(axes: "Axes", cases: Cases, condition: Condition) -> None:
    for variant in VARIANTS:
        groups = grouped(cases.get((condition, variant), []), "turns_since")
        points = [
            (since, sum(scores) / len(scores), *wilson_interval(round(sum(scores)), len(scores)))
            for since, scores in groups.items()
        ]
        if points:
            draw_band(axes, np.array(points, dtype=float), variant)
    plain(axes, condition.label)
    axes.title.set_fontsize(7)
    axes.set_ylim(-0.03, 1.03)
    whole_numbers(axes.xaxis)
