"""Pictures of a report's rows: base against trained by condition, and curves over the compression ratio."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsekv_pl.reporting.condition import FULL_CACHE, marked
from sparsekv_pl.reporting.plots import COLOURS, MARKS, STYLES, bars, caption, plain, plots, plots_for
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.reporting.summary import Row, headline


class Panel(NamedTuple):
    """One plot of a picture: its metric, and the prefix of the rows' fields ("" for the score itself)."""

    title: str
    metric: str
    field: str = ""
    xlim: tuple[float, float | None] | None = None


SCORES = (
    Panel("needle accuracy (higher is better)", "needle_accuracy", xlim=(-0.02, 1.02)),
    Panel("continuation perplexity (lower is better)", "perplexity"),
)
RETENTION = (
    Panel("needle accuracy over that of the full cache", "needle_accuracy", "retention_", (-0.02, None)),
    Panel("perplexity over that of the full cache", "perplexity", "retention_"),
)


def dots_figure(rows: Sequence[Row], panels: Sequence[Panel] = SCORES) -> Figure:
    """Draw scores as dots with 95 % bars: a line per condition, a plot per panel.

    * marks a press never seen in training.
    """
    rows = headline(rows)
    known = {
        panel: [r for r in rows if r.metric == panel.metric and any(_any([r], panel.field + v) for v in VARIANTS)]
        for panel in panels
    }
    panels = [panel for panel in panels if known[panel]]
    lines = list(dict.fromkeys(row.condition for row in rows))
    trained = _any(rows, "trained")
    unseen = {row.condition for row in rows if trained and row.condition.may_be_seen and not row.seen_in_training}
    labels = [condition.label + " *" * (condition in unseen) for condition in lines]
    width = 1.5 + 0.075 * max(map(len, labels)) + 4.4 * max(1, len(panels))
    figure, (drawn, *_) = plots((width, 1.8 + 0.42 * len(lines)), 1, max(1, len(panels)), sharey=True)
    if not panels:
        drawn[0].remove()
        figure.text(0.5, 0.5, "nothing was measured", ha="center")
        return figure
    for axes, panel in zip(drawn, panels, strict=True):
        _draw_dots(axes, [(lines.index(row.condition), row) for row in known[panel]], panel)
    drawn[0].set(ylim=(len(lines) - 0.5, -0.5))
    drawn[0].set_yticks(range(len(lines)), labels)
    handles, names = drawn[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False)
    marked = "; * never seen in training" if unseen else ""
    caption(figure, f"press and compression ratio{marked}; bars: 95 % intervals")
    return figure


def _draw_dots(axes: Axes, rows: Sequence[tuple[int, Row]], panel: Panel) -> None:
    both = all(_any([row for _, row in rows], panel.field + variant) for variant in VARIANTS)
    for variant, shift in (("base", -0.14 * both), ("trained", 0.14 * both)):
        name = panel.field + variant
        found = [(y + shift, getattr(row, name), getattr(row, f"{name}_interval")) for y, row in rows]
        points = [(y, x, *(span or (x, x))) for y, x, span in found if x is not None]
        if not points:
            continue
        y, x, low, high = np.array(points, dtype=float).T
        look: dict[str, Any] = {"fmt": MARKS[variant], "color": COLOURS[variant], "markersize": 5, "capsize": 3}
        axes.errorbar(x, y, xerr=bars(x, low, high), label=variant, **look)
    if panel.field:
        axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_title(panel.title, fontsize=11)
    axes.margins(x=0.08)
    if panel.xlim:
        axes.set_xlim(*panel.xlim)
    axes.grid(axis="x", alpha=0.3)


def curves_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw scores over the compression ratio: a plot per task and way to evict, a colour per press, 95 % bands.

    Base is dashed, and a curve begins at the full cache. None if no press was measured at a ratio above 0.
    """
    evicted = [r for r in rows if r.condition.evicts and r.condition.compression_ratio > 0 and r.cases]
    drawn = list(dict.fromkeys((row.task, row.condition.way) for row in evicted))
    presses = list(dict.fromkeys(row.condition.press for row in evicted))
    if not drawn:
        return None
    columns = min(3, len(drawn))
    legend = -(-(len(presses) + 2) // (2 * columns))  # lines of it
    figure, grid = plots_for(len(drawn), (4.6, 3.2), 0.28 * legend + 0.4)
    for axes, (task, way) in zip(grid, drawn, strict=True):
        several = len({plot[1] for plot in drawn if plot[0] == task}) > 1 or way != "dense"
        plain(axes, f"{task}, {way}" if several else task)
        _draw_curves(axes, [row for row in rows if row.task == task], way, presses)
    handles = [
        *(Line2D([], [], color="0.2", linestyle=STYLES[v], label=v) for v in VARIANTS if _any(evicted, v)),
        *(Line2D([], [], **_look(presses, press), linewidth=3, label=marked(press)) for press in presses),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, frameon=False, fontsize=8)
    return figure


def _draw_curves(axes: Axes, rows: Sequence[Row], way: str, presses: list[str]) -> None:
    full = [row for row in rows if row.condition.press == FULL_CACHE][:1]
    for press in presses:
        own = [row for row in rows if row.condition.press == press and row.condition.way == way]
        start = [] if any(row.condition.compression_ratio == 0 for row in own) else full
        for variant in VARIANTS:
            shown = [*start, *own] if own else []
            points = [p for row in shown if (p := row.point(row.condition.compression_ratio, variant))]
            if points:
                x, y, low, high = np.array(sorted(points), dtype=float).T
                look = _look(presses, press)
                axes.plot(x, y, STYLES[variant], **look, markersize=3.5, linewidth=1.4)
                # Fainter bands with more curves, so that the curves stay visible.
                axes.fill_between(
                    x, low, high, color=look["color"], alpha=min(0.12, 0.5 / len(presses) / 2), linewidth=0
                )
    metric = rows[0].metric
    axes.set_xlabel("compression ratio", fontsize=8)
    axes.set_ylabel("needle accuracy" if metric == "needle_accuracy" else "perplexity", fontsize=8)
    axes.set_xlim(-0.02, None)
    if metric == "needle_accuracy":
        axes.set_ylim(-0.02, 1.02)


def _any(rows: Sequence[Row], field: str) -> bool:
    return any(getattr(row, field) is not None for row in rows)


def _look(presses: list[str], press: str) -> dict[str, Any]:
    """Colour and marker of a press: ten colours, then the next marker."""
    turn, place = divmod(presses.index(press), 10)
    return {"color": colormaps["tab10"](place), "marker": "os^Dv*"[turn % 6]}
