"""RULER by setting, in its own score: every press beside the full cache, base and trained, a heat map per length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.reporting.condition import FULL_CACHE, Condition
from sparsekv_pl.reporting.kvpress_layout import is_ruler
from sparsekv_pl.reporting.plots import caption, plots
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.reporting.summary import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

ABLE = 0.2
"""A setting is judged if the full cache, base or trained, has at least this score: below it nothing can be lost."""
Cells = dict[tuple[str, Condition], Row]


def ruler_figure(by_length: Mapping[int, Sequence[Row]]) -> "Figure | None":
    """Draw RULER's own score by setting (down) and press (right): base above trained, a column per context length.

    In the trained model's maps a white frame marks scores above base by more than chance, a red one scores below (the
    95 % interval of the paired difference excludes 0). Settings that the full cache cannot do are faded. None for fewer
    than two of RULER's settings.
    """
    found = {length: _cells(rows) for length, rows in sorted(by_length.items())}
    found = {length: cells for length, cells in found.items() if cells}
    settings = list(dict.fromkeys(task for cells in found.values() for task, _ in cells))
    conditions = list(dict.fromkeys(condition for cells in found.values() for _, condition in cells))
    every = [row for cells in found.values() for row in cells.values()]
    variants = [variant for variant in VARIANTS if any(getattr(row, variant) is not None for row in every)]
    if len(settings) < 2:
        return None
    size = (2.2 + (0.6 + 0.42 * len(conditions)) * len(found), 2.2 + 0.28 * len(settings) * len(variants))
    figure, grid = plots(size, len(variants), len(found), sharex=True, sharey=True)
    for line, variant in zip(grid, variants, strict=True):
        for axes, (length, cells) in zip(line, found.items(), strict=True):
            image = _draw(axes, cells, settings, conditions, variant)
            if variant == variants[0]:
                axes.set_title(f"{length:,} tokens", fontsize=9)
        line[0].set_ylabel(variant, fontsize=9)
        line[0].set_yticks(range(len(settings)), settings, fontsize=7)
    for axes in grid[-1]:
        axes.set_xticks(range(len(conditions)), [c.label for c in conditions], rotation=90, fontsize=7)
    framed = "frames: trained above (white) or below (red) base by more than chance; " * (len(variants) == 2)
    caption(figure, f"{framed}faded: the full cache scores below {ABLE}")
    figure.colorbar(image, ax=grid, shrink=0.9, aspect=30).ax.tick_params(labelsize=7)
    return figure


def not_judged(by_length: Mapping[int, Sequence[Row]]) -> Iterator[str]:
    """Yield a sentence that names the settings whose full cache scores below 0.2, by length; nothing without any."""
    for length, rows in sorted(by_length.items()):
        cells = _cells(rows)
        full = [row for row in cells.values() if row.condition.press == FULL_CACHE]
        unable = [row for row in full if not _able(cells, row.task)]
        if unable:
            named = ", ".join(f"{row.task} ({' -> '.join(_scores(row))})" for row in unable)
            yield f"RULER at {length:,} tokens: the full cache scores below {ABLE} in {named}: not judged."


def _cells(rows: Sequence[Row]) -> Cells:
    return {(row.task, row.condition): _rulers_score(row) for row in rows if is_ruler(row.task) and row.cases}


def _rulers_score(row: Row) -> Row:
    """Return the row with RULER's own score, the share of the values that an answer contains, for needle accuracy."""
    own: dict[str, Any] = {name: row.besides.get(f"substring_{name}") for name in (*VARIANTS, "difference_interval")}
    return replace(row, **own)


def _able(cells: Cells, task: str) -> bool:
    full = [row for (own, condition), row in cells.items() if own == task and condition.press == FULL_CACHE]
    return not full or any((getattr(row, variant) or 0) >= ABLE for row in full for variant in VARIANTS)


def _scores(row: Row) -> list[str]:
    return [f"{value:.2f}" for variant in VARIANTS if (value := getattr(row, variant)) is not None]


def _draw(
    axes: "Axes", cells: Cells, settings: Sequence[str], conditions: Sequence[Condition], variant: str
) -> "AxesImage":
    values: NDArray[np.float64] = np.full((len(settings), len(conditions)), np.nan)
    faded = np.ones_like(values)
    for (task, condition), row in cells.items():
        value = getattr(row, variant)
        if value is not None:
            values[settings.index(task), conditions.index(condition)] = value
    for place, task in enumerate(settings):
        faded[place] = 1.0 if _able(cells, task) else 0.35
    axes.set_facecolor("0.9")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", alpha=faded)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        colour = "black" if value > 0.6 or faded[row, column] < 1 else "white"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=6.5)
        if variant == "trained" and faded[row, column] == 1:
            _frame(axes, cells[settings[row], conditions[column]], row, column)
    axes.tick_params(labelsize=7)
    return image


def _frame(axes: "Axes", row: Row, down: int, right: int) -> None:
    from matplotlib.patches import Rectangle

    low, high = row.difference_interval or (0.0, 0.0)
    colour = "white" if low > 0 else "red" if high < 0 else None
    if colour is not None:
        box = Rectangle((right - 0.45, down - 0.45), 0.9, 0.9, fill=False, edgecolor=colour, linewidth=1.3)
        axes.add_patch(box)
