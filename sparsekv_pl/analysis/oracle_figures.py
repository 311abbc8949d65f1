"""Pictures of oracle hot blocks: the attention on a document's blocks, and the rank of the answer's block."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from sparsekv_pl.analysis.oracle_findings import ATTENTION, BM25, PLACE, SINKS, TARGETS, Sample
from sparsekv_pl.reporting.plots import COLOURS, STYLES, bars, heat_map, layer_numbers, plain, plots, whole_numbers

MOST_ROWS = 60
"""Most questions in one picture; only the first ones are drawn."""
LOOKS = {ATTENTION: "o", BM25: "s", PLACE: "^"}
OTHERS = {BM25: "tab:orange", PLACE: "tab:green"}


def mass_figure(concentrations: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the mass in the k hottest blocks, and the blocks that hold 80 to 95 % of it, with and without the sink."""
    names = [name for name in SINKS if any(name in part for part in concentrations.values())]
    figure, ((*curves, carrying),) = plots((4.2 * (len(names) + 1), 3.6), 1, len(names) + 1)
    for axes, name in zip(curves, names, strict=True):
        for variant, parts in concentrations.items():
            part = parts[name]
            k = np.arange(1, len(part["curve"]) + 1)
            axes.plot(
                k, part["curve"], STYLES[variant], color=COLOURS[variant], marker="o", markersize=3.5, label=variant
            )
            low, high = np.array(part["curve_intervals"], dtype=float).T
            axes.fill_between(k, low, high, color=COLOURS[variant], alpha=0.2, linewidth=0)
        axes.plot(k, part["curve_if_even"], ":", color="0.3", label="evenly spread")
        _curve_axes(axes, f"hottest blocks, {name}", "share of the attention on the document")
    _draw_carrying(carrying, concentrations, names)
    return figure


def _draw_carrying(axes: Axes, concentrations: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    groups = [(variant, name) for variant in concentrations for name in names]
    width = 0.8 / len(groups)
    for number, (variant, name) in enumerate(groups):
        found = [concentrations[variant][name]["carrying"][str(target)] for target in TARGETS]
        heights = np.array([estimate["mean"] for estimate in found])
        low, high = np.array([estimate["interval"] for estimate in found]).T
        axes.bar(
            np.arange(len(TARGETS)) + (number - (len(groups) - 1) / 2) * width,
            heights,
            width,
            yerr=bars(heights, low, high),
            color=COLOURS[variant],
            alpha=1.0 if SINKS[name] == 0 else 0.5,
            capsize=3,
            label=f"{variant}, {name} (of {concentrations[variant][name]['blocks']:.1f})",
        )
    axes.set_xticks(range(len(TARGETS)), [f"{100 * target:.0f} %" for target in TARGETS])
    axes.set(xlabel="share of the attention", ylabel="blocks (mean)")
    plain(axes, "blocks that hold so much")
    axes.margins(y=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def recall_figure(recalls: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw how often the answer is among the k first blocks, by ranker, with and without the sink block."""
    names = [name for name in SINKS if any(name in part for part in recalls.values())]
    figure, (line,) = plots((4.8 * len(names), 3.8), 1, len(names))
    for axes, name in zip(line, names, strict=True):
        for variant, parts in recalls.items():
            for ranker, marker in LOOKS.items():
                if ranker in parts[name] and not (ranker == BM25 and variant != next(iter(recalls))):
                    curve = parts[name][ranker]["curve"]
                    colour = OTHERS.get(ranker, COLOURS[variant])
                    label = ranker if ranker == BM25 or len(recalls) == 1 else f"{ranker}, {variant}"
                    k = np.arange(1, len(curve) + 1)
                    axes.plot(k, curve, STYLES[variant], color=colour, marker=marker, markersize=3.5, label=label)
        chance = parts[name][ATTENTION]["curve_by_chance"]
        axes.plot(np.arange(1, len(chance) + 1), chance, ":", color="0.3", label="chance")
        title = f"{name}, {parts[name][ATTENTION]['cases']} questions"
        _curve_axes(axes, title, "answer among the k hottest blocks")
    return figure


def layers_figure(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw, by layer, the share of the hottest blocks and of the sink, and the recall of the answer's block."""
    figure, ((mass, recall),) = plots((11, 4.3), 1, 2)
    sink, rest = SINKS
    for variant, rows in layers.items():
        style = STYLES[variant]
        for label, colour, values in (
            (f"hottest, {sink}", "tab:blue", [_mean(row[sink]["top_share"]) for row in rows]),
            (f"hottest, {rest}", "tab:cyan", [_mean(row[rest]["top_share"]) for row in rows]),
            ("block 0", "0.4", [_mean(row["sink_share"]) for row in rows]),
            ("after the document, of all", "tab:red", [_mean(row["beyond"]) for row in rows]),
        ):
            _line(mass, values, style, colour, label, variant, len(layers))
        for name, colour in ((sink, "tab:blue"), (rest, "tab:cyan")):
            _line(recall, [row[name].get("recall", np.nan) for row in rows], style, colour, name, variant, len(layers))
            bands = [row[name].get("interval", (np.nan, np.nan)) for row in rows]
            recall.fill_between(range(len(rows)), *np.array(bands).T, color=colour, alpha=0.12, linewidth=0)
        answers = [_mean(row[rest].get("answer_share")) for row in rows]
        _line(recall, answers, style, "tab:orange", f"attention on the answer's blocks, {rest}", variant, len(layers))
    plain(mass, "attention on the document")
    plain(recall, "the answer's block is among the hottest")
    for axes, what in ((mass, "share"), (recall, "share of the questions")):
        axes.set(xlabel="layer", ylabel=what, ylim=(-0.02, 1.03))
        layer_numbers(axes.xaxis, [row["layer"] for row in next(iter(layers.values()))])
        axes.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def samples_figure(samples: Sequence[Sample]) -> Figure:
    """Draw each question's attention over its blocks without the sink, relative to its hottest block.

    The answer's blocks are framed. Questions with a known answer block come first, ordered by it.
    """
    drawn = sorted(samples[:MOST_ROWS], key=lambda s: (not s.answer, s.answer or []))
    widest = max(len(sample.scores) for sample in drawn)
    grid = np.full((len(drawn), widest), np.nan)
    for row, sample in enumerate(drawn):
        rest = sample.scores[1:]
        grid[row, 1 : len(sample.scores)] = rest / rest.max() if len(rest) and rest.max() > 0 else rest
    figure, ((axes,),) = plots((min(14.0, 2.5 + 0.35 * widest), 1.6 + 0.16 * len(drawn)))
    axes.set_facecolor("0.85")
    title = "attention by block, of the hottest after block 0; red: holds the answer"
    heat_map(axes, grid, title, vmin=0, vmax=1, cmap="viridis")
    for row, sample in enumerate(drawn):
        for block in sample.answer or []:
            axes.add_patch(Rectangle((block - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=1.5))
    axes.set(xlabel="block (grey: the sink block, or none)", ylabel="question")
    whole_numbers(axes.xaxis, axes.yaxis)
    return figure


def _line(axes: Axes, values: ArrayLike, style: str, colour: str, label: str, variant: str, variants: int) -> None:
    axes.plot(
        values, style, color=colour, marker="o", markersize=2.5, label=label if variants == 1 else f"{label}, {variant}"
    )


def _mean(estimate: Mapping[str, Any] | None) -> float:
    return np.nan if estimate is None else estimate["mean"]


def _curve_axes(axes: Axes, title: str, share: str) -> None:
    plain(axes, title)
    axes.set(xlabel="k", ylabel=share, ylim=(0, 1.03))
    whole_numbers(axes.xaxis)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
