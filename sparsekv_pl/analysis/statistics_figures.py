"""Pictures of attention statistics: by layer and head, trained minus base, and the mass by block of the context."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sparsekv_pl.analysis.statistics_report import Summary, labels, picture_names
from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.reporting.heatmaps import sparsity_figure
from sparsekv_pl.reporting.plots import heat_map, layer_numbers, plots

FAINTEST = 1e-4
"""Smallest share of attention on the logarithmic scale; smaller ones are drawn like it."""


def statistics_figures(summaries: Sequence[Summary], settings: StatisticsSettings) -> dict[str, tuple[str, Figure]]:
    """File name -> (caption, picture), with the names of ``picture_names``."""
    figures: dict[str, tuple[str, Figure]] = {}
    for summary in summaries:
        measures = [
            {label: np.asarray(means["measures"][name], np.float64) for name, label in labels(settings).items()}
            for means in summary["variants"].values()
        ]
        layers = summary["layers"]
        drawn = [_heads_figure(values, layers, labels(settings)["effective_support"]) for values in measures]
        if len(measures) > 1:
            base, trained = measures
            drawn.append(difference_figure({name: trained[name] - base[name] for name in base}, layers))
        drawn.append(received_figure(summary, settings.block_size))
        names = picture_names(summaries, summary)
        figures |= {name: (alt, figure) for (name, alt), figure in zip(names.items(), drawn, strict=True)}
    return figures


def difference_figure(differences: Mapping[str, NDArray[np.float64]], layers: Sequence[int]) -> Figure:
    """``sparsity_figure`` of differences (layers, H): white is none, blue less, red more."""
    figure = sparsity_figure(differences, numbers=layers)
    for image in (image for axes in figure.axes for image in axes.images):
        values = np.asarray(image.get_array())
        widest = max(float(np.abs(values).max()), 1e-12)
        image.set(cmap="RdBu_r", clim=(-widest, widest))
    return figure


def received_figure(summary: Summary, block_size: int) -> Figure:
    """Draw each variant's mass by layer and block: its share, and its multiple of evenly spread attention."""
    variants = summary["variants"]
    layers = len(next(iter(variants.values()))["received"])
    size = (11, min(9.0, 1.8 + 0.11 * layers) * len(variants))
    figure, grid = plots(size, len(variants), 2, sharex=True, sharey=True)
    even = np.asarray(summary["even_received"])
    for (left, right), (variant, means) in zip(grid, variants.items(), strict=True):
        share = np.asarray(means["received"])
        times = (share / even).clip(1 / 30, 30)
        heat_map(left, share.clip(FAINTEST), "share of the attention", cmap="viridis", norm=LogNorm(FAINTEST, 1))
        heat_map(right, times, "times attention spread evenly", cmap="RdBu_r", norm=LogNorm(1 / 30, 30))
        left.set_ylabel(f"{variant}\nlayer", fontsize=8)
        layer_numbers(left.yaxis, summary["layers"])
    figure.supxlabel(f"block of {block_size} tokens", fontsize=8)
    return figure


def _heads_figure(measures: Mapping[str, NDArray[np.float64]], layers: Sequence[int], logarithmic: str) -> Figure:
    """``sparsity_figure`` with a logarithmic scale for one measure, whose values differ by orders of magnitude."""
    figure = sparsity_figure(measures, numbers=layers)
    for axes in figure.axes:
        if axes.get_title() == logarithmic:
            axes.images[0].set_norm("log")
    return figure
