"""The picture of a validation: similarity of sparse to dense attention, and speed-up, by layer."""

from collections.abc import Sequence
from statistics import mean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsekv_pl.blocksparse.validation_summary import EXPECTED
from sparsekv_pl.reporting.plots import caption, plain, plots
from sparsekv_pl.storage.records import Record, grouped

PANELS = {"cosine_similarity": "cosine similarity to dense attention", "speedup": "speed-up over dense attention"}


def validation_figure(records: Sequence[Record]) -> Figure:
    """Draw a plot per measure with a line per length over layers, averaged over samples; dense layers are hollow.

    Dashed lines are the least expected values, in the colour of their length if they have one.
    """
    figure, (line,) = plots((10.5, 4), 1, 2)
    measured = [record for record in records if "refused" not in record]
    if not measured:
        for axes in line:
            axes.remove()
        figure.text(0.5, 0.5, "nothing was measured", ha="center")
        return figure
    lengths = sorted({record["seq_len"] for record in measured})
    colours = {length: colormaps["viridis"](i / max(1, len(lengths)) * 0.9) for i, length in enumerate(lengths)}
    for axes, (field, title) in zip(line, PANELS.items(), strict=True):
        for length in lengths:
            _draw(axes, [record for record in measured if record["seq_len"] == length], field, colours[length])
        for expected in EXPECTED:
            if expected.field == field and (expected.length is None or expected.length in colours):
                colour = "0.3" if expected.length is None else colours[expected.length]
                axes.axhline(expected.low, color=colour, linestyle="--", linewidth=0.9)
        axes.set_xlabel("layer", fontsize=9)
        plain(axes, title)
        if field == "speedup":
            axes.axhline(1, color="0.3", linewidth=0.8)
            axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(lengths), frameon=False, fontsize=8)
    caption(figure, "hollow: layers kept dense; dashed: expected at least")
    return figure


def _draw(axes: Axes, records: Sequence[Record], field: str, colour: tuple[float, ...]) -> None:
    layers = sorted(grouped(records, "layer_idx").items())
    points = [(layer, mean(r[field] for r in own), own[0]["kept_dense"]) for layer, own in layers]
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, y, color=colour, linewidth=1.2, label=f"{records[0]['seq_len']} tokens")
    for kept_dense in (False, True):
        own_x = [point[0] for point in points if point[2] == kept_dense]
        own_y = [point[1] for point in points if point[2] == kept_dense]
        axes.plot(own_x, own_y, "o", color=colour, markersize=4, markerfacecolor="white" if kept_dense else colour)
