"""Pictures of anchor summaries (see anchor_report.py), one variant or base beside trained."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.reporting.figures import COLOURS, STYLES
from sparsekv_pl.reporting.heatmaps import sparsity_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]


def types_figure(summaries: Mapping[str, Summary]) -> "Figure":
    """Draw bars by type: attention per token, share of attention beside share of tokens, and multiple of chance."""
    from matplotlib.figure import Figure

    names = [row["type"] for row in next(iter(summaries.values()))["types"]]
    figure = Figure(figsize=(13, 3.8), dpi=130, layout="constrained")
    per_token, share, times = figure.subplots(1, 3)
    bars = {variant: summary["types"] for variant, summary in summaries.items()}
    _bars(per_token, names, {variant: _column(rows, "per_token") for variant, rows in bars.items()})
    tokens = {"tokens": _column(next(iter(bars.values())), "tokens")}
    _bars(share, names, tokens | {variant: _column(rows, "attention") for variant, rows in bars.items()})
    _bars(times, names, {variant: _column(rows, "times_chance") for variant, rows in bars.items()})
    per_token.set_title("attention per token and query that sees it", fontsize=10)
    share.set_title("share of attention, beside that of tokens", fontsize=10)
    times.set_title("times chance (types: without sinks)", fontsize=10)
    times.axhline(1, color="0.3", linewidth=0.8)
    for axes in (per_token, times):
        axes.set_yscale("log")
    return figure


def layers_figure(layers: Mapping[str, Summary]) -> "Figure":
    """Draw heat maps of layer x type for each variant's ``layer_table``: share of attention, and multiple of chance."""
    from matplotlib.figure import Figure

    depth = len(next(iter(layers.values()))["attention"])
    size = (9.4, (1.6 + 0.13 * depth) * len(layers) + 0.4)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(len(layers), 2, squeeze=False)
    for (left, right), (variant, table) in zip(grid, layers.items(), strict=True):
        columns = table["columns"]
        _map(left, columns, _array(table["attention"]), "viridis", (0, 1))
        with np.errstate(divide="ignore"):
            _map(right, columns[1:], np.log2(_array(table["times_chance"])), "RdBu_r", (-3, 3))
        left.set_title(f"{variant}: share of attention", fontsize=9)
        right.set_title(f"{variant}: times chance, without sinks (log2; grey: no such token)", fontsize=9)
        left.set_ylabel("layer", fontsize=8)
    return figure


def distances_figure(summaries: Mapping[str, Summary]) -> "Figure":
    """Draw attention per token over the distance from the query, and the share of it that the nearest tokens hold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for variant, summary in summaries.items():
        rows, look = summary["distances"], {"color": COLOURS[variant], "label": variant}
        near = np.array([max(row["from"], 0.7) for row in rows])  # 0 has no place on a logarithmic axis
        for part, style in (("without_sinks", STYLES[variant]), ("all", ":")):
            label = f"{variant}, without sinks" if part != "all" else f"{variant}, with sinks"
            values = _column([row[part] for row in rows], "per_token")
            left.plot(near, values, style, color=COLOURS[variant], label=label, marker="o", markersize=3)
        right.plot(
            [row["to"] for row in rows], _column(rows, "held"), STYLES[variant], marker="o", markersize=3, **look
        )
        rule = summary["rule"]
        right.axvline(max(rule["anchors"]["recent"], 1), color=COLOURS[variant], linewidth=0.8, linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="distance from the query (tokens; leftmost: its own)")
    left.set_ylabel("attention per token")
    right.set(xscale="log", ylim=(0, 1.02), xlabel="nearest tokens (dotted: recommended)")
    right.set_ylabel("share of attention not on sinks")
    for axes in (left, right):
        _plain_axes(axes)
    return figure


def positions_figure(summaries: Mapping[str, Summary]) -> "Figure":
    """Draw the multiple of chance over the position in the text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    for variant, summary in summaries.items():
        rows = summary["positions"]
        x = [(row["from"] + row["to"] + 1) / 2 for row in rows]  # counted from 1, for the logarithmic axis
        axes.plot(x, _column(rows, "times_chance"), STYLES[variant], color=COLOURS[variant], label=variant, marker="o")
    axes.axhline(1, color="0.3", linewidth=0.8)
    asked = next(iter(summaries.values()))["rule"]["threshold"]
    axes.axhline(asked, color="0.3", linewidth=0.8, linestyle=":", label="asked of a sink")
    axes.set(xscale="log", yscale="log", xlabel="position in the text (tokens, the first is 1)", ylabel="times chance")
    _plain_axes(axes)
    return figure


def heads_figure(summaries: Mapping[str, Summary], carrying: float) -> "Figure":
    """Draw heat maps of layer x head: the share of tokens that carry the share ``carrying`` of the attention."""
    return sparsity_figure(
        {
            f"{variant}: share of tokens that carry {carrying:.0%}": summary["heads"]["carrying"]
            for variant, summary in summaries.items()
        }
    )


def anchor_figures(summaries: Mapping[str, Summary], carrying: float) -> "dict[str, Figure]":
    """All pictures by the names of ``anchor_report.PICTURES``."""
    return {
        "types": types_figure(summaries),
        "layers": layers_figure({variant: summary["layers"] for variant, summary in summaries.items()}),
        "distances": distances_figure(summaries),
        "positions": positions_figure(summaries),
        "heads": heads_figure(summaries, carrying),
    }


def _bars(axes: "Axes", names: Sequence[str], groups: Mapping[str, NDArray[np.float64]]) -> None:
    width = 0.8 / len(groups)
    for n, (label, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + (n - (len(groups) - 1) / 2) * width
        axes.bar(places, values, width, label=label, color=COLOURS.get(label, "tab:orange"))
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=8)


def _map(
    axes: "Axes", columns: Sequence[str], values: NDArray[np.float64], colours: str, limits: tuple[float, float]
) -> None:
    axes.set_facecolor("0.8")
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)


def _plain_axes(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8)


def _column(rows: Sequence[Summary], name: str) -> NDArray[np.float64]:
    """The numbers ``name`` of all rows; NaN for None."""
    return _array([row[name] for row in rows])


def _array(values: Any) -> NDArray[np.float64]:
    """``values`` as an array; None becomes NaN."""
    return np.asarray(values, dtype=np.float64)
