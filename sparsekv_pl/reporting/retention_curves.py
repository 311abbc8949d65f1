"""Retention over the compression ratio, a plot per press: base, trained and the ceiling."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsekv_pl.reporting.condition import ORACLE, foresees
from sparsekv_pl.reporting.plots import COLOURS, MARKS, caption, draw_band, legend_above
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.reporting.summary import Row, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
CEILING: dict[str, Any] = {"base": ":", "trained": "--"}
"""Lines of the ceilings."""
Curve = NDArray[np.float64]
"""(points, 4): compression ratio, retention, and the bounds of its interval."""


def retention_figure(rows: Sequence[Row]) -> "Figure | None":
    """Draw retention of needle accuracy over the compression ratio, all retrieval tasks together.

    Each press has a plot with base and trained, 95 % bands, and in thin lines with hollow marks the ceiling: the same
    variant with a press that knows what will be asked. None if no press has a retention.
    """
    from matplotlib.figure import Figure

    kept = [row for row in headline(rows) if row.metric == "needle_accuracy" and row.retention_cases]
    own = [row.condition for row in kept if not foresees(row.condition.press)]
    plots = list(dict.fromkeys((condition.press, condition.way) for condition in own))
    if not plots:
        return None
    columns = min(COLUMNS, len(plots))
    lines = -(-len(plots) // columns)
    figure = Figure(figsize=(3.7 * columns, 2.7 * lines + 0.6), dpi=130, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    ceiling = [row for row in kept if row.condition.press == ORACLE]
    for axes, (press, way) in zip(grid, plots, strict=False):
        shown = [row for row in kept if (row.condition.press, row.condition.way) == (press, way)]
        _draw(axes, shown, ceiling)
        unseen = " *" * (not shown[0].seen_in_training and any(row.trained is not None for row in shown))
        axes.set_title(press + (f", {way}" if way != "dense" else "") + unseen, fontsize=10)
    for axes in grid[len(plots) :]:
        axes.remove()
    _scale(grid[0], sorted({row.condition.compression_ratio for row in kept}))
    handles = {handle.get_label(): handle for axes in grid[: len(plots)] for handle in axes.get_lines()}
    named = [handles[name] for name in handles if not str(name).startswith("_")]
    legend_above(figure, named)
    marked = "; * never seen in training" if any(axes.get_title().endswith("*") for axes in grid) else ""
    caption(figure, f"compression ratio (share of the KV pairs removed){marked}")
    figure.supylabel("needle accuracy over the full cache's", fontsize=9)
    return figure


def _draw(axes: "Axes", own: Sequence[Row], ceiling: Sequence[Row]) -> None:
    axes.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    for variant in VARIANTS:
        curve = _curve(own, variant)
        if len(curve) > 1:
            draw_band(axes, curve, variant)
        x, y, _, _ = _curve(ceiling, variant).T
        if len(x) > 1:
            look: dict[str, Any] = {
                "color": COLOURS[variant],
                "marker": MARKS[variant],
                "markerfacecolor": "white",
                "markersize": 7 if variant == "base" else 4,  # one is seen around the other
            }
            axes.plot(x, y, CEILING[variant], linewidth=1.2, label=f"ceiling (sees the question), {variant}", **look)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=7)


def _curve(rows: Sequence[Row], variant: str) -> Curve:
    """The variant's retentions by rising ratio, from the full cache's own, 1."""
    found = (row.point(row.condition.compression_ratio, f"retention_{variant}") for row in rows)
    points = [point for point in found if point is not None]
    return np.array(sorted([(0.0, 1.0, 1.0, 1.0), *points]), dtype=float)


def _scale(axes: "Axes", ratios: Sequence[float]) -> None:
    """Space the ratios by the logarithm of what is kept: 0.9 to 0.99 takes as much room as 0 to 0.9."""

    def kept(ratio: ArrayLike) -> NDArray[np.float64]:
        return -np.log10(np.maximum(1 - np.asarray(ratio, np.float64), 1e-6))

    def ratio(kept: ArrayLike) -> NDArray[np.float64]:
        return 1 - np.power(10.0, -np.asarray(kept, np.float64))

    axes.set_xscale("function", functions=(kept, ratio))
    axes.set_xticks([0.0, *ratios], [f"{value:g}".removeprefix("0") or "0" for value in [0.0, *ratios]])
    axes.minorticks_off()
    axes.set_xlim(0, float(ratio(kept(max(ratios)) + 0.05)))
    axes.set_ylim(bottom=-0.03)
