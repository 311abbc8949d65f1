"""Retention over the context length, a plot per press and ratio: base and trained."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.reporting.condition import FULL_CACHE, Condition, marked
from sparsekv_pl.reporting.heatmaps import short_number
from sparsekv_pl.reporting.plots import caption, draw_band, legend_above, plain, plots_for
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.reporting.summary import Row, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]
"""(points, 4): context length in tokens, value, and the bounds of its interval."""
HELD = 0.05
"""Half the width of the grey band around the value at the shortest length."""


def length_figure(by_length: Mapping[int, Sequence[Row]]) -> "Figure | None":
    """Draw retention of needle accuracy over the context length, with 95 % bands; the first plot is the full cache.

    The full cache has its accuracy. The grey band is within 5 points of the trained model's (or, without one, the
    base's) value at the shortest length. None for fewer than two lengths, or without a retention.
    """
    needles = {
        length: {row.condition: row for row in headline(rows) if row.metric == "needle_accuracy"}
        for length, rows in sorted(by_length.items())
    }
    needles = {length: rows for length, rows in needles.items() if rows}
    conditions = list(dict.fromkeys(condition for rows in needles.values() for condition in rows))
    full = [condition for condition in conditions if condition.press == FULL_CACHE][:1]
    kept = [c for c in conditions if any(c in rows and rows[c].retention_cases for rows in needles.values())]
    if len(needles) < 2 or not kept:
        return None
    figure, grid = plots_for(len(full) + len(kept), (3.3, 2.5), 0.7)
    for axes, condition in zip(grid, [*full, *kept], strict=True):
        rows = {length: own[condition] for length, own in needles.items() if condition in own}
        _draw(axes, rows, "" if condition in full else "retention_")
        _name(axes, condition, rows)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(needles), [short_number(length) for length in needles])
        axes.minorticks_off()
    handles = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    named = [handles[variant] for variant in VARIANTS if variant in handles]
    legend_above(figure, named)
    caption(figure, "context (tokens); grey: at most 5 points below the shortest; * never seen in training")
    figure.supylabel("needle accuracy over the full cache's", fontsize=9)
    return figure


def _draw(axes: "Axes", rows: Mapping[int, Row], field: str) -> None:
    curves = {variant: _curve(rows, field + variant) for variant in VARIANTS}
    drawn = {variant: curve for variant, curve in curves.items() if len(curve)}
    for variant, curve in drawn.items():
        draw_band(axes, curve, variant)
    for shortest in [curve[0, 1] for curve in drawn.values()][-1:]:
        axes.axhspan(shortest - HELD, shortest + HELD, color="0.5", alpha=0.12, linewidth=0, zorder=0)
    axes.set_ylim(-0.03, max(1.03, *axes.get_ylim()))


def _curve(rows: Mapping[int, Row], name: str) -> Curve:
    return np.array([point for length, row in rows.items() if (point := row.point(length, name))], dtype=float)


def _name(axes: "Axes", condition: Condition, rows: Mapping[int, Row]) -> None:
    trained = any(row.trained is not None for row in rows.values())
    unseen = trained and condition.may_be_seen and not any(row.seen_in_training for row in rows.values())
    name = "full cache: accuracy" if condition.press == FULL_CACHE else condition.label
    plain(axes, f"{name}{' *' * unseen}")
    axes.title.set_fontsize(9 if len(marked(name)) < 40 else 7)
