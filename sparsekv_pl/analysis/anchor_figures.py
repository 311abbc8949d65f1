"""Pictures of anchor summaries (see anchor_report.py), one variant or base beside trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sparsekv_pl.reporting.heatmaps import sparsity_figure
from sparsekv_pl.reporting.plots import COLOURS, STYLES, heat_map, layer_numbers, plain, plots

Summary = Mapping[str, Any]


def types_figure(summaries: Mapping[str, Summary]) -> Figure:
    """Draw bars by type: attention per token, share of attention beside share of tokens, and multiple of chance."""
    names = [row["type"] for row in next(iter(summaries.values()))["types"]]
    figure, ((per_token, share, times),) = plots((13, 3.8), 1, 3)
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


def layers_figure(layers: Mapping[str, Summary]) -> Figure:
    """Draw heat maps of layer x type for each variant's ``layer_table``: share of attention, and multiple of chance."""
    depth = len(next(iter(layers.values()))["attention"])
    figure, grid = plots((9.4, (1.6 + 0.13 * depth) * len(layers) + 0.4), len(layers), 2)
    for (left, right), (variant, table) in zip(grid, layers.items(), strict=True):
        columns = table["columns"]
        with np.errstate(divide="ignore"):
            times = np.log2(_array(table["times_chance"]))
        heat_map(left, _array(table["attention"]), f"{variant}: share of attention", cmap="viridis", vmin=0, vmax=1)
        title = f"{variant}: times chance, without sinks (log2; grey: no such token)"
        heat_map(right, times, title, cmap="RdBu_r", vmin=-3, vmax=3)
        for axes, names in ((left, columns), (right, columns[1:])):
            axes.set_facecolor("0.8")
            axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7)
            layer_numbers(axes.yaxis, table.get("layers"))  # a callback's state of an older version has none
        left.set_ylabel("layer", fontsize=8)
    return figure


def distances_figure(summaries: Mapping[str, Summary]) -> Figure:
    """Draw attention per token over the distance from the query, and the share of it that the nearest tokens hold."""
    figure, ((left, right),) = plots((11, 3.8), 1, 2)
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
        plain(axes)
        axes.legend(frameon=False, fontsize=8)
    return figure


def positions_figure(summaries: Mapping[str, Summary]) -> Figure:
    """Draw the multiple of chance over the position in the text."""
    figure, ((axes,),) = plots((7.5, 3.8))
    for variant, summary in summaries.items():
        rows = summary["positions"]
        x = [(row["from"] + row["to"] + 1) / 2 for row in rows]  # counted from 1, for the logarithmic axis
        axes.plot(x, _column(rows, "times_chance"), STYLES[variant], color=COLOURS[variant], label=variant, marker="o")
    axes.axhline(1, color="0.3", linewidth=0.8)
    asked = next(iter(summaries.values()))["rule"]["threshold"]
    axes.axhline(asked, color="0.3", linewidth=0.8, linestyle=":", label="asked of a sink")
    axes.set(xscale="log", yscale="log", xlabel="position in the text (tokens, the first is 1)", ylabel="times chance")
    plain(axes)
    axes.legend(frameon=False, fontsize=8)
    return figure


def anchor_figures(summaries: Mapping[str, Summary], carrying: float) -> dict[str, tuple[str, Figure]]:
    """File name -> (caption, picture)."""
    layers = layers_figure({variant: summary["layers"] for variant, summary in summaries.items()})
    numbers = next(iter(summaries.values()))["layers"]["layers"]
    types = "Attention per token, share of attention and times chance, by token type"
    distances = "Attention per token and cumulative share by distance from the query"
    heads = "Share of tokens that carry most of the attention, layer by head"
    carried = f"share of tokens that carry {carrying:.0%}"
    shares = {f"{variant}: {carried}": summary["heads"]["carrying"] for variant, summary in summaries.items()}
    return {
        "types.png": (types, types_figure(summaries)),
        "layers.png": ("Share of attention and times chance, layer by token type", layers),
        "distances.png": (distances, distances_figure(summaries)),
        "positions.png": ("Attention by absolute position, in multiples of chance", positions_figure(summaries)),
        "heads.png": (heads, sparsity_figure(shares, numbers=numbers)),
    }


def _bars(axes: Axes, names: Sequence[str], groups: Mapping[str, NDArray[np.float64]]) -> None:
    width = 0.8 / len(groups)
    for n, (label, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + (n - (len(groups) - 1) / 2) * width
        axes.bar(places, values, width, label=label, color=COLOURS.get(label, "tab:orange"))
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=8)


def _column(rows: Sequence[Summary], name: str) -> NDArray[np.float64]:
    """The numbers ``name`` of all rows; NaN for None."""
    return _array([row[name] for row in rows])


def _array(values: Any) -> NDArray[np.float64]:
    """``values`` as an array; None becomes NaN."""
    return np.asarray(values, dtype=np.float64)
