"""Pictures of a comparison of block methods: selected blocks beside true attention, agreement, and scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sparsekv_pl.blocksparse.block_methods import DENSE, ORACLE
from sparsekv_pl.blocksparse.comparison_summary import ALL_LENGTHS, Line
from sparsekv_pl.reporting.plots import bars, caption, plain, plots, whole_numbers
from sparsekv_pl.storage.records import Record

FAINTEST = 1e-4
"""Smallest share of attention on the logarithmic scale; smaller ones are drawn like it."""
LAYER_PANELS = {
    "recall_free": "true top blocks found,\nwithout first and own block",
    "spearman_free": "rank correlation with true attention,\nwithout first and own block",
    "mass_kept": "attention mass kept",
}

TABLES = ("agreement", "agreement_by_layer", "text", "needles")


def comparison_figures(
    records: Sequence[Record], summary: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, tuple[str, Figure]]:
    """File name -> (caption, picture), up to four for each variant of the model."""
    variants = list(dict.fromkeys(record["variant"] for record in records))
    figures: dict[str, tuple[str, Figure]] = {}
    for variant in variants:
        end = f"_{variant}.png" if len(variants) > 1 else ".png"
        own = {name: [row for row in summary[name] if row["variant"] == variant] for name in summary if name in TABLES}
        methods = list(dict.fromkeys(row["method"] for row in own["agreement"]))
        if methods:
            most = max(row["length"] for row in own["agreement"])
            by_layer = [row for row in own["agreement_by_layer"] if row["length"] == most]
            at_budgets = budget_figure(own["agreement"], methods, settings["budgets"])
            figures[f"mass_over_budget{end}"] = "attention mass kept over blocks per query", at_budgets
            shown = f"agreement with true attention by layer, {most:,} tokens"
            figures[f"agreement_by_layer{end}"] = shown, layers_figure(by_layer, methods)
        pictures = [record for record in records if record["kind"] == "picture" and record["variant"] == variant]
        if pictures:
            longest = max(pictures, key=lambda record: record["length"])["case"]
            first = [picture for picture in pictures if picture["case"] == longest]
            beside = sorted(methods, key=lambda name: not name.startswith(ORACLE))
            shown = f"chosen blocks beside true attention, {longest}"
            figures[f"blocks{end}"] = shown, blocks_figure(first, beside)
        if own["text"] or own["needles"]:
            figures[f"passes{end}"] = "perplexity and needles by method", _passes(own["text"], own["needles"])
    return figures


def _passes(text: Sequence[Line], needles: Sequence[Line]) -> Figure:
    panels, names = {}, list(dict.fromkeys(pass_name(row) for row in [*text, *needles]))
    lengths = dict.fromkeys(row["length"] for row in [*text, *needles])
    for length in [ALL_LENGTHS] if ALL_LENGTHS in lengths else lengths:
        named = "all lengths" if length == ALL_LENGTHS else f"{length:,} tokens"
        for title, rows, value in (
            (f"perplexity over dense\n{named}", text, "ratio"),
            (f"needle accuracy\n{named}", needles, "accuracy"),
        ):
            found = [row for row in rows if row["length"] == length]
            dense = next((row[value] for row in found if row["method"] == DENSE), None)
            if found:
                panels[title] = [
                    {"name": pass_name(row), "value": row[value], "interval": row[f"{value}_interval"], "dense": dense}
                    for row in found
                ]
    return passes_figure(panels, names)


def pass_name(row: Line) -> str:
    """The method's name, with its budget if it has one."""
    return row["method"] if row["budget"] is None else f"{row['method']}, {row['budget']} blocks"


def blocks_figure(pictures: Sequence[Record], methods: Sequence[str]) -> Figure:
    """Draw, per layer, the true attention between blocks and each method's selection, averaged over heads."""
    size = (2.0 * (len(methods) + 1) + 1.2, 2.15 * len(pictures) + 0.6)
    figure, grid = plots(size, len(pictures), len(methods) + 1, sharex=True, sharey=True)
    for line, picture in zip(grid, pictures, strict=True):
        truth = _lower(picture["truth"])
        attention = line[0].imshow(np.maximum(truth, FAINTEST), norm=LogNorm(FAINTEST, 1), cmap="magma")
        for axes, method in zip(line[1:], methods, strict=True):
            if method in picture["chosen"]:
                share = axes.imshow(_lower(picture["chosen"][method]), vmin=0, vmax=1, cmap="viridis")
            else:
                axes.text(0.5, 0.5, "dense", ha="center", va="center", transform=axes.transAxes, fontsize=8)
        line[0].set_ylabel(f"layer {picture['layer']}\nquery block", fontsize=8)
    for axes, name in zip(grid[0], ["true attention", *methods], strict=True):
        axes.set_title(name.replace(", ", ",\n", 1), fontsize=8)
    for axes in grid.flat:
        axes.tick_params(labelsize=6)
        axes.set_facecolor("0.9")
    for axes in grid[-1]:
        axes.set_xlabel("key block", fontsize=8)
    for image, name in ((attention, "share of attention"), (share, "share of heads that choose it")):
        bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30, pad=0.01)
        bar.set_label(name, fontsize=7)
        bar.ax.tick_params(labelsize=6)
    return figure


def _lower(values: Sequence[Sequence[float]]) -> Any:
    """``values`` (N, N) with blocks after the query block masked."""
    grid = np.asarray(values, np.float64)
    return np.ma.masked_array(grid, np.triu(np.ones_like(grid, dtype=bool), 1))


def budget_figure(rows: Sequence[Line], methods: Sequence[str], budgets: Sequence[int]) -> Figure:
    """Draw the attention mass kept over blocks per query block: a plot per context length, a line per method."""
    lengths = sorted({row["length"] for row in rows})
    figure, (line,) = plots((4.4 * len(lengths), 3.9), 1, len(lengths), sharey=True)
    for axes, length in zip(line, lengths, strict=True):
        for method in methods:
            found = [row for row in rows if row["length"] == length and row["method"] == method]
            points = [(b, row[f"mass_at_{b}"]) for row in found for b in budgets if f"mass_at_{b}" in row]
            if not points:  # selects by a threshold
                continue
            axes.plot(*zip(*points, strict=True), **_look(methods, method), markersize=4, linewidth=1.4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.set_xlabel("key blocks per query block", fontsize=8)
        plain(axes, f"{length:,} tokens")
    line[0].set_ylabel("attention mass kept", fontsize=8)
    _legend(figure, line[0], len(lengths))
    return figure


def layers_figure(rows: Sequence[Line], methods: Sequence[str]) -> Figure:
    """Draw the agreement with true attention by layer: a plot per measure, a line per method, gaps at dense layers."""
    layers = sorted({row["layer"] for row in rows})
    figure, (line,) = plots((4.4 * len(LAYER_PANELS), 3.9), 1, len(LAYER_PANELS))
    for axes, (measure, title) in zip(line, LAYER_PANELS.items(), strict=True):
        for method in methods:
            known = {row["layer"]: row[measure] for row in rows if row["method"] == method}
            values = [np.nan if known.get(layer) is None else known[layer] for layer in layers]
            axes.plot(layers, values, **_look(methods, method), markersize=3, linewidth=1.2)
        axes.set_xlabel("layer", fontsize=8)
        whole_numbers(axes.xaxis, most=8)
        plain(axes, title)
    _legend(figure, line[0], len(LAYER_PANELS))
    return figure


def passes_figure(panels: Mapping[str, Sequence[Line]], names: Sequence[str]) -> Figure:
    """Draw scores as dots with 95 % bars: a plot per panel, a line per method in the order of ``names``.

    ``panels``: title -> rows with ``name``, ``value``, ``interval`` and ``dense``, dense attention's value.
    """
    width = 1.2 + 0.075 * max(map(len, names)) + 3.8 * len(panels)
    figure, (line,) = plots((width, 1.4 + 0.3 * len(names)), 1, len(panels), sharey=True)
    for axes, (title, rows) in zip(line, panels.items(), strict=True):
        for row in rows:
            low, high = row["interval"] or (row["value"], row["value"])
            span = bars([row["value"]], low, high)
            axes.errorbar(row["value"], names.index(row["name"]), xerr=span, fmt="o", color="tab:blue", capsize=3)
        axes.axvline(rows[0]["dense"], color="0.4", linewidth=0.8)
        plain(axes, title)
    line[0].set_yticks(range(len(names)), names)
    line[0].set_ylim(len(names) - 0.5, -0.5)
    caption(figure, "bars: 95 % intervals; the line: dense attention")
    return figure


def _look(methods: Sequence[str], method: str) -> dict[str, Any]:
    """Colour, marker and line style of a method; oracles are dashed, so that they do not hide other lines."""
    place = methods.index(method)
    style = "--" if method.startswith(ORACLE) else "-"
    return {"color": colormaps["tab10"](place % 10), "marker": "osDv^<>pX*"[place % 10], "ls": style, "label": method}


def _legend(figure: Figure, axes: Axes, plots: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), 2 * plots)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
