"""A picture of a training's curves, from the TensorBoard events in its run's folder.

python -m sparsekv_pl.reporting.training_curves output/quickstart
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.reporting.logged_terms import KEPT, MOST
from sparsekv_pl.reporting.plots import png
from sparsekv_pl.storage.whole_files import replace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "training-curves.png"
COLUMNS = 3
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Optimizer steps and values."""
LEFT_OUT = ("train/loss", "train/compression_ratio", "train/kept_share", "train/skipped_steps")
"""Sums of the other terms, and what a schedule sets."""
REACHED = f"{KEPT} of the most"
"""What a press keeps over what its budget could keep: comparable where the ratio changes from step to step."""


def read_curves(run: Path) -> dict[str, Curve]:
    """Read the scalars of training and validation that a run logged, by name; a resumed run's later values count.

    The attention that presses keep is given as a share of the most that they could keep.

    Raises
    ------
    ValueError
        If the folder holds no such scalars.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all
    events.Reload()
    curves: dict[str, Curve] = {}
    for name in events.Tags()["scalars"]:
        if name.startswith(("train/", "val/")) and name not in LEFT_OUT:
            values = {scalar.step: scalar.value for scalar in events.Scalars(name)}
            steps = sorted(values)
            curves[name] = np.array(steps, dtype=float), np.array([values[step] for step in steps], dtype=float)
    for name in [name for name in curves if f"/{MOST}/" in name]:
        at, most = curves.pop(name)
        _, kept = curves.pop(name.replace(MOST, KEPT))
        curves[name.replace(MOST, REACHED)] = at, kept / np.where(most > 0, most, np.nan)
    if not curves:
        raise ValueError(f"{run} holds no TensorBoard events of a training: give the folder of a run, output/NAME")
    return curves


def training_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Draw a plot per group of curves: names that differ only in their last part, or after the last "_", share one."""
    from matplotlib.figure import Figure

    groups: dict[str, list[str]] = {}
    for name in sorted(curves):
        groups.setdefault(_group(name), []).append(name)
    columns = min(COLUMNS, math.ceil(math.sqrt(len(groups))))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines + 0.3), dpi=130, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (group, names) in zip(grid, groups.items(), strict=False):
        _draw(axes, group, names, curves)
    for axes in grid[len(groups) :]:
        axes.remove()
    figure.supxlabel("optimizer step", fontsize=9)
    return figure


def write_training_curves(run: Path) -> Path:
    """Write training-curves.png into a run's folder, and return its path."""
    run = run.expanduser()
    replace(run / PICTURE, png(training_figure(read_curves(run))))
    return run / PICTURE


def _group(name: str) -> str:
    """The plot of a curve: "train/selection/KeyDiff" -> "train/selection", "val/perplexity_full" -> "val/perplexity".

    A loss term without parts has a plot of its own.
    """
    kind, *parts = name.split("/")
    if len(parts) > 1:
        return "/".join([kind, *parts[:-1]])
    return f"{kind}/{parts[0].partition('_')[0]}" if kind == "val" else name


def _draw(axes: "Axes", group: str, names: Sequence[str], curves: Mapping[str, Curve]) -> None:
    for name in names:
        steps, values = curves[name]
        label = name.removeprefix(group).strip("/_") or name
        few = "o" if len(steps) < 20 else ""
        axes.plot(steps, values, marker=few, markersize=3, linewidth=1.3, label=label)
    if len(names) > 1:
        axes.legend(fontsize=7, frameon=False)
    axes.set_title(group, fontsize=10)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(auto_cli(write_training_curves))
