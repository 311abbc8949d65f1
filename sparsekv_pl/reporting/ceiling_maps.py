"""Heat maps of the attention that a press keeps over the most that its budget could keep, by layer and KV head."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike, NDArray

from sparsekv_pl.reporting.condition import Condition, marked
from sparsekv_pl.reporting.plots import layer_numbers, plots, whole_numbers
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.storage.records import Record

BAR = "attention kept, of the most that as many pairs hold (1: the ceiling)"


@dataclass(frozen=True)
class Reached:
    """What one side kept under one condition, summed over cases: ``kept`` and ``most`` are (layers, K)."""

    kept: NDArray[np.float64]
    most: NDArray[np.float64]

    @property
    def by_head(self) -> NDArray[np.float64]:
        """Kept over most, (layers, K); NaN where there was nothing to keep."""
        return np.divide(self.kept, self.most, out=np.full_like(self.kept, np.nan), where=self.most > 0)

    @property
    def mean(self) -> float:
        """The same of all heads together."""
        return float(self.kept.sum() / self.most.sum()) if self.most.any() else float("nan")


def reached_of(records: Iterable[Record]) -> dict[Condition, dict[str, Reached]]:
    """Sum records with "kept_attention" and "most_attention" by condition and variant."""
    found: dict[Condition, dict[str, Reached]] = {}
    for record in records:
        sides = found.setdefault(Condition.of(record), {})
        kept, most = (np.array(record[name], np.float64) for name in ("kept_attention", "most_attention"))
        before = sides.get(record["variant"])
        sides[record["variant"]] = (
            Reached(kept, most) if before is None else Reached(before.kept + kept, before.most + most)
        )
    return found


def reached_rows(found: Mapping[Condition, Mapping[str, Reached]]) -> Iterator[Record]:
    """Yield a JSON-able row per condition and variant: shares by layer and KV head, null where there was nothing."""
    for condition, sides in found.items():
        for variant, one in sides.items():
            by_head = [[None if isnan(share) else share for share in layer] for layer in one.by_head.tolist()]
            reached = None if isnan(one.mean) else one.mean
            yield {**condition.columns(), "variant": variant, "reached": reached, "by_layer_and_head": by_head}


def reached_figures(
    reached: Mapping[Condition, Mapping[str, Reached]], numbers: Sequence[int]
) -> Iterator[tuple[str, Figure]]:
    """Yield (press, picture) for each press: base above trained, a column per ratio and way to evict.

    ``numbers`` are the model's layers that the rows are of.
    """
    for press in dict.fromkeys(condition.press for condition in reached):
        columns = [condition for condition in reached if condition.press == press]
        lines = [variant for variant in VARIANTS if any(variant in reached[one] for one in columns)]
        figure, grid = plots(_size(len(lines), len(columns), len(numbers)), len(lines), len(columns))
        for variant, drawn in zip(lines, grid, strict=True):
            for condition, axes in zip(columns, drawn, strict=True):
                if variant not in reached[condition]:
                    axes.remove()
                    continue
                own = reached[condition][variant]
                image = _draw(axes, own.by_head, numbers)
                ratio = f"ratio {condition.compression_ratio:g}"
                axes.set_title(
                    "\n".join(filter(None, (ratio, condition.when, f"{variant}: {own.mean:.2f}"))), fontsize=8
                )
        figure.suptitle(marked(press), fontsize=10)
        figure.supxlabel("KV head", fontsize=8)
        figure.supylabel("layer", fontsize=8)
        _bar(figure, image, list(grid.flat))
        yield press, figure


def reached_map(press: str, by_head: ArrayLike) -> Figure:
    """Draw one map (layers, K) of ``press``."""
    values = np.asarray(by_head, np.float64)
    figure, ((axes,),) = plots(_size(1, 1, len(values)))
    image = _draw(axes, values, None)
    axes.set(xlabel="KV head", ylabel="layer")
    figure.suptitle(press, fontsize=10)
    _bar(figure, image, [axes])
    return figure


def _size(lines: int, columns: int, layers: int) -> tuple[float, float]:
    return 1.5 * columns + 1.8, lines * min(4.5, 1.6 + 0.07 * layers) + 0.8


def _draw(axes: Axes, values: NDArray[np.float64], numbers: Sequence[int] | None) -> AxesImage:
    """Draw one map from 0 to 1, in a scale whose lightness rises; grey where there was nothing to keep."""
    axes.set_facecolor("0.8")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.tick_params(labelsize=7)
    whole_numbers(axes.xaxis, most=8)
    layer_numbers(axes.yaxis, numbers)
    return image


def _bar(figure: Figure, image: AxesImage, axes: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=[one for one in axes if one.figure is not None], aspect=30)
    bar.set_label(BAR, fontsize=8)
    bar.ax.tick_params(labelsize=7)
