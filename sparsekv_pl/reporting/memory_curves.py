"""Needles and perplexity over the memory of keys and values: one plot per press, a colour per number of bits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.lines import Line2D

from sparsekv_pl.reporting.memory_points import MemoryPoint
from sparsekv_pl.reporting.plots import STYLES, caption, legend_above, plain, plots
from sparsekv_pl.reporting.sorted_records import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = {"needles": "needle accuracy", "text": "perplexity"}
"""Field of ``MemoryPoint`` -> label."""


def memory_figure(points: Sequence[MemoryPoint]) -> "Figure | None":
    """Draw every score over the bytes of keys and values, as a share of the full cache's; base is dashed.

    None if no pairs were quantised: bytes then follow the compression ratio.
    """
    evicted = [point for point in points if point.condition.evicts]
    stored = list(dict.fromkeys(point.condition.stored for point in evicted))
    if not any(stored):
        return None
    presses = list(dict.fromkeys((point.condition.press, point.condition.prefill) for point in evicted))
    fields = [name for name in SCORES if any(getattr(point, name) is not None for point in evicted)]
    figure, grid = plots((4.6 * len(presses), 3.2 * len(fields) + 0.6), len(fields), len(presses), sharey="row")
    for line, field in zip(grid, fields, strict=True):
        for axes, (press, prefill) in zip(line, presses, strict=True):
            own = [point for point in evicted if (point.condition.press, point.condition.prefill) == (press, prefill)]
            plain(axes, press + (f", {prefill}" if prefill != "dense" else ""))
            for place, bits in enumerate(stored):
                _draw(axes, [point for point in own if point.condition.stored == bits], field, place)
            axes.set_xscale("log", base=2)
            axes.invert_xaxis()
            axes.xaxis.set_major_formatter(lambda share, _: f"1/{1 / share:.0f}" if share < 1 else "1")
        line[0].set_ylabel(SCORES[field], fontsize=8)
    trained = [variant for variant in VARIANTS if any(_score(point, f, variant) for point in evicted for f in fields)]
    handles = [
        *(Line2D([], [], color="0.2", linestyle=STYLES[variant], label=variant) for variant in trained),
        *(Line2D([], [], color=_colour(i), linewidth=3, label=bits or "whole pairs") for i, bits in enumerate(stored)),
    ]
    legend_above(figure, handles)
    caption(figure, "bytes of keys and values over the full cache's")
    return figure


def _draw(axes: "Axes", points: Sequence[MemoryPoint], field: str, place: int) -> None:
    for variant in VARIANTS:
        known = sorted(
            (1 / point.times_less, score) for point in points if (score := _score(point, field, variant)) is not None
        )
        if known:
            axes.plot(*zip(*known, strict=True), STYLES[variant], color=_colour(place), marker="o", markersize=3.5)


def _score(point: MemoryPoint, field: str, variant: str) -> float | None:
    row = getattr(point, field)
    score: float | None = None if row is None else getattr(row, variant)
    return score


def _colour(place: int) -> tuple[float, float, float, float]:
    return colormaps["tab10"](place)
