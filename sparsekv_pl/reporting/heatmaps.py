"""Heat maps: needles found by depth and length, and sparsity by layer and head."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike, NDArray

from sparsekv_pl.models.batch import TEXT
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.plots import caption, heat_map, layer_numbers, plots, plots_for, whole_numbers
from sparsekv_pl.reporting.sorted_records import ALL_RETRIEVAL, VARIANTS, Measured
from sparsekv_pl.storage.records import Record

MOST_DEPTHS = 12
"""With more depths than this, they are grouped in tenths of the haystack."""


@dataclass(frozen=True)
class Grid:
    """The cells of a heat map: context lengths in tokens, and depths."""

    lengths: list[int]
    depths: list[float]
    """Fractions of the haystack; if `tenths`, the beginnings of tenths."""
    tenths: bool

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Grid":
        """The grid for these records."""
        tenths = len({_rounded(record["depth"], False) for record in records}) > MOST_DEPTHS
        depths = sorted({_rounded(record["depth"], tenths) for record in records})
        return cls(sorted({record["length"] for record in records}), depths, tenths)

    def counts(self, records: Sequence[Record]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Numbers of needles found and of needles asked for, (depths, lengths) each."""
        found, asked = np.zeros((2, len(self.depths), len(self.lengths)))
        for record in records:
            cell = self.depths.index(_rounded(record["depth"], self.tenths)), self.lengths.index(record["length"])
            found[cell] += record["exact"]
            asked[cell] += 1
        return found, asked

    def depth_labels(self) -> list[str]:
        """Labels of the depths in percent."""
        return [f"{100 * depth:g}" + (f"-{100 * depth + 10:g}" if self.tenths else "") for depth in self.depths]


def _rounded(depth: float, tenths: bool) -> float:
    return min(int(depth * 10 + 1e-9), 9) / 10 if tenths else round(depth, 2)


def needle_figures(measured: Measured) -> Iterator[tuple[str, Figure]]:
    """Yield (press, picture) for each press: base above trained, a column per ratio, full cache first.

    Yields nothing for a single depth and length, where the accuracy suffices.
    """
    needles = {condition: dict(_needles(measured, condition)) for condition in measured.conditions}
    grid = Grid.of([record for sides in needles.values() for side in sides.values() for record in side])
    if len(grid.lengths) < 2 and len(grid.depths) < 2:
        return
    conditions = [condition for condition in measured.conditions if needles[condition]]
    full = [condition for condition in conditions if not condition.evicts]
    presses = dict.fromkeys(condition.press for condition in conditions if condition.evicts)
    for press in presses or dict.fromkeys(condition.press for condition in full):
        own = [condition for condition in conditions if condition.press == press]
        figure = _panels([*full, *own] if presses else own, needles, grid)
        if presses:
            figure.suptitle(press, fontsize=10)
        yield press, figure


def _needles(measured: Measured, condition: Condition) -> Iterator[tuple[str, list[Record]]]:
    for variant in measured.variants:
        records = [
            record
            for task in measured.tasks
            if task not in (TEXT, ALL_RETRIEVAL)
            for record in measured.sides.get((condition, task), {}).get(variant, {}).values()
            if record.get("depth") is not None
        ]
        if records:
            yield variant, records


def _panels(
    columns: Sequence[Condition], needles: Mapping[Condition, Mapping[str, Sequence[Record]]], grid: Grid
) -> Figure:
    variants = [v for v in VARIANTS if any(v in needles[condition] for condition in columns)]
    wide = max(1.9, 0.55 * len(grid.lengths) + 0.3)
    high = max(1.5, 0.3 * len(grid.depths) + 0.6)
    size = (wide * len(columns) + 1.8, high * len(variants) + 1.2)
    figure, grid_of_plots = plots(size, len(variants), len(columns), sharex=True, sharey=True)
    for line, variant in zip(grid_of_plots, variants, strict=True):
        for axes, condition in zip(line, columns, strict=True):
            image = _draw(axes, *grid.counts(needles[condition].get(variant, [])))
        line[0].set_ylabel(f"{variant}\ndepth (%)", fontsize=8)
    for axes, condition in zip(grid_of_plots[0], columns, strict=True):
        axes.set_title(_column_title(condition, letters=int(wide / 0.075)), fontsize=8)
    axes.set_xticks(range(len(grid.lengths)), [short_number(length) for length in grid.lengths])
    axes.set_yticks(range(len(grid.depths)), grid.depth_labels())
    caption(figure, "context (tokens); in a cell: needles found of those asked")
    bar = figure.colorbar(image, ax=grid_of_plots, shrink=0.9, aspect=25)
    bar.set_label("needle accuracy", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _column_title(condition: Condition, letters: int) -> str:
    """A column's title: ratio and prefill. The press is the picture's title."""
    name = f"ratio {condition.compression_ratio:.2f}" if condition.evicts else condition.press
    return "\n".join(textwrap.fill(part, letters) for part in (name, condition.when) if part)


def _draw(axes: Axes, found: NDArray[np.float64], asked: NDArray[np.float64]) -> AxesImage:
    """One heat map: depth down, length to the right. Grey where nothing was asked."""
    share = np.divide(found, asked, out=np.full(asked.shape, np.nan), where=asked > 0)
    axes.set_facecolor("0.9")
    image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), count in np.ndenumerate(asked):
        if count:
            hits = float(found[row, column])
            label = f"{hits:g}/{count:g}" if hits.is_integer() else f"{share[row, column]:.2f}"
            colour = "black" if share[row, column] > 0.6 else "white"
            axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=6.5)
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="x", labelrotation=45)
    return image


def sparsity_figure(
    measures: Mapping[str, ArrayLike], heads_are: str = "head", numbers: Sequence[int] | None = None
) -> Figure:
    """Draw heat maps of layer x head, one per measure, each with its own scale.

    ``measures`` is name with its unit ("effective support (tokens)") -> (layers, H); ``heads_are`` labels the axis of
    heads. ``numbers`` are the model's layers that the rows are of; None: 0, 1, 2, ...

    Raises ``ValueError`` without measures, or for an array that is empty or not 2-D.
    """
    arrays = {name: np.asarray(values, np.float64) for name, values in measures.items()}
    wrong = {name: array.shape for name, array in arrays.items() if array.ndim != 2 or not array.size}
    if wrong or not arrays:
        raise ValueError(f"measures must hold (layers, heads) arrays, at least one; got {wrong or 'none'}")
    layers, heads = max(a.shape[0] for a in arrays.values()), max(a.shape[1] for a in arrays.values())
    figure, grid = plots_for(len(arrays), (min(7.0, 3.4 + 0.1 * heads), min(9.0, 1.8 + 0.11 * layers)))
    for axes, (name, array) in zip(grid, arrays.items(), strict=True):
        heat_map(axes, array, name, cmap="viridis")
        axes.set_xlabel(heads_are, fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        whole_numbers(axes.xaxis, most=8)
        layer_numbers(axes.yaxis, numbers, most=8)
    return figure


def short_number(number: int) -> str:
    """Abbreviate a number: 384 -> "384", 50000 -> "50k", 1000000 -> "1M"."""
    for unit, letter in ((1_000_000, "M"), (10_000, "k")):
        if number >= unit:
            return f"{number / (1000 if letter == 'k' else unit):.3g}{letter}"
    return str(number)
