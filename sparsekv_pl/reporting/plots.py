"""What all pictures share: figures without pyplot, heat maps with a colour bar, plain axes, legends outside."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

COLOURS = {"base": "0.55", "trained": "tab:blue"}
STYLES: dict[str, Any] = {"base": "--", "trained": "-"}
MARKS = {"base": "o", "trained": "s"}
"""Markers, so that no reader depends on colours."""


def plots(size: tuple[float, float], rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Figure, NDArray[Any]]:
    """Make a figure of ``size`` in inches, without a window or global state, and its plots (rows, columns)."""
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def plots_for(count: int, size: tuple[float, float], extra: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``count`` plots of ``size`` each, at most three in a row, and ``extra`` inches below them."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure, grid = plots((size[0] * columns, size[1] * rows + extra), rows, columns)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def heat_map(axes: Axes, values: ArrayLike, title: str, **look: Any) -> AxesImage:
    """Draw ``values`` (rows, columns) with a colour bar; ``look`` goes to ``imshow``."""
    image = axes.imshow(np.asarray(values), aspect="auto", interpolation="nearest", **look)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    return image


def plain(axes: Axes, title: str = "") -> None:
    """Set a title, a light grid and small labels."""
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def caption(figure: Figure, text: str) -> None:
    """Write ``text`` below all plots, in as many lines as the figure's width asks for."""
    points, letter = 8, 0.6  # the mean width of a letter in heights
    figure.supxlabel(textwrap.fill(text, int(figure.get_figwidth() * 72 / (points * letter))), fontsize=points)


def draw_band(axes: Axes, curve: NDArray[np.float64], variant: str) -> None:
    """Draw a variant's ``curve`` (points, 4), x, value and the bounds of its interval, with its band."""
    x, y, low, high = curve.T
    axes.plot(x, y, "-", color=COLOURS[variant], marker=MARKS[variant], markersize=3.5, linewidth=1.5, label=variant)
    axes.fill_between(x, low, high, color=COLOURS[variant], alpha=0.15, linewidth=0)


def legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put a legend above all plots, in as many columns as fit the figure's width."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def whole_numbers(*axes: Any, most: int = 10) -> None:
    """Put ticks of these axes (``axes.xaxis``, ``axes.yaxis``) on whole numbers, at most ``most``."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(most, integer=True))


def layer_numbers(axis: Any, layers: Sequence[int] | None, most: int = 10) -> None:
    """Put ticks of ``axis`` on rows, labelled by the model's ``layers`` that they are of; None: 0, 1, 2, ..."""
    whole_numbers(axis, most=most)
    if layers is not None:
        axis.set_major_formatter(lambda row, _: str(layers[int(row)]) if 0 <= row < len(layers) else "")


def bars(points: ArrayLike, low: ArrayLike, high: ArrayLike) -> list[NDArray[np.float64]]:
    """Lengths of error bars below and above ``points``; a percentile interval may miss its own point slightly."""
    middle, least, most = (np.asarray(values, np.float64) for values in (points, low, high))
    return [np.maximum(middle - least, 0), np.maximum(most - middle, 0)]


def png(figure: Figure) -> bytes:
    """The picture as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure to (height, width, 3) uint8, without pyplot."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
