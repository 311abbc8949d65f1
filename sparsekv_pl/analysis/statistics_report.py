"""Report of attention statistics: numbers for JSON and CSV, and the sections of a page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.reporting.file_formats import csv_bytes
from sparsekv_pl.reporting.intervals import paired_bootstrap
from sparsekv_pl.reporting.page import Section, Table
from sparsekv_pl.storage.records import Record, grouped

Summary = dict[str, Any]


def labels(settings: StatisticsSettings) -> dict[str, str]:
    """Measure -> its name in reports, with the unit."""
    return {
        "entropy": "entropy (nats)",
        "effective_support": "effective support exp(entropy) (tokens)",
        "top_k_coverage": f"mass on the {settings.top_k} heaviest keys",
        "block_sparsity": f"share of {settings.block_size}-token blocks under {settings.block_threshold:.3g} of mass",
        "anchor_share": "mass on anchors",
        "first_block_share": f"mass on the first {settings.block_size} tokens",
    }


def summaries_of(records: Sequence[Record], settings: StatisticsSettings, layers: Sequence[int]) -> list[Summary]:
    """Means over windows for each task and length; base and trained must have the same windows.

    ``layers`` are the model's layers that the records' rows are of.
    """
    summaries = []
    for (task, length), some in sorted(grouped(records, "task", "length").items()):
        own = {
            variant: sorted(found, key=lambda record: str(record["id"]))
            for variant, found in grouped(some, "variant").items()
        }
        summaries.append(
            {
                "task": task,
                "length": length,
                "windows": len(next(iter(own.values()))),
                "layers": list(layers),
                "variants": {variant: _means(found) for variant, found in own.items()},
                "overall": [_overall(name, label, own) for name, label in labels(settings).items()],
                "even_received": even_attention(length, settings).tolist(),
            }
        )
    return summaries


def even_attention(length: int, settings: StatisticsSettings) -> NDArray[np.float64]:
    """(blocks,): the mass on each block if queries spread their attention evenly over the keys they see."""
    first = length - min(length, settings.window or length)
    per_query = np.where(np.arange(length) >= first, 1 / np.arange(1, length + 1), 0) / (length - first)
    per_key = per_query[::-1].cumsum()[::-1]
    return np.add.reduceat(per_key, np.arange(0, length, settings.block_size))


def statistics_sections(summaries: Sequence[Summary], settings: StatisticsSettings) -> list[Section]:
    """A report section for each task and length."""
    seen = "all queries" if settings.window is None else f"the last {settings.window} queries"
    reading = [
        f"Means over {seen} of every window. Brackets hold 95 % intervals of the mean over layers and heads, with "
        "windows drawn with replacement. The difference is paired: both sides are drawn with the same windows.",
        "Effective support is the number of tokens over which evenly spread attention has the same entropy. It is "
        "averaged over queries, so it is not the exponential of the mean entropy. Anchors are sinks, special tokens "
        "and punctuation, unless others were chosen.",
        "Distribution over the context: every query sees the first block and only the last ones see the last, so the "
        "right-hand picture divides by the mass from queries that spread their attention evenly over all keys they "
        "see. It rises to the right because near tokens get more attention than far ones.",
    ]
    sections = []
    for summary in summaries:
        title = f"{summary['task']}, {summary['length']} tokens, {summary['windows']} windows"
        tables = [_overall_table(summary), _layer_table(summary, settings)]
        sections.append(
            Section(title, list(picture_names(summaries, summary)), reading if summary is summaries[0] else [], tables)
        )
    return sections


def picture_names(summaries: Sequence[Summary], summary: Summary) -> dict[str, str]:
    """File name -> caption: each variant's heads, their difference, and the mass by block."""
    prefix = f"{summary['task']}-{summary['length']}-" if len(summaries) > 1 else ""
    names = {
        f"{prefix}heads-{variant}.png": f"Statistics by layer and head, {variant}" for variant in summary["variants"]
    }
    if len(summary["variants"]) > 1:
        names[f"{prefix}heads-difference.png"] = "Statistics by layer and head, trained minus base"
    return names | {f"{prefix}received.png": "Where in the context attention lies, by layer"}


def statistics_files(summaries: Sequence[Summary]) -> dict[str, bytes]:
    """The content of heads.csv (a line per head) and received.csv (a line per layer and block)."""
    heads, blocks = [], []
    for summary in summaries:
        for variant, means in summary["variants"].items():
            what = {"task": summary["task"], "length": summary["length"], "variant": variant}
            for layer, head in np.ndindex(np.shape(means["measures"]["entropy"])):
                values = {name: values[layer][head] for name, values in means["measures"].items()}
                heads.append({**what, "layer": summary["layers"][layer], "head": head, **values})
            for layer, shares in zip(summary["layers"], means["received"], strict=True):
                for block, (share, even) in enumerate(zip(shares, summary["even_received"], strict=True)):
                    blocks.append({**what, "layer": layer, "block": block, "share": share, "if_even": even})
    return {"heads.csv": csv_bytes(heads), "received.csv": csv_bytes(blocks)}


def _means(records: Sequence[Record]) -> Summary:
    names = records[0]["measures"]
    return {
        "measures": {name: np.mean([r["measures"][name] for r in records], axis=0).tolist() for name in names},
        "received": np.mean([r["received"] for r in records], axis=0).tolist(),
    }


def _overall(name: str, label: str, own: dict[str, list[Record]]) -> Summary:
    """Means over layers, heads and windows of base and trained, and their difference, with intervals."""
    by_window = {variant: [np.mean(r["measures"][name]) for r in found] for variant, found in own.items()}
    columns = np.stack([*by_window.values(), np.ones(len(next(iter(by_window.values()))))], axis=1)
    intervals = paired_bootstrap(columns, lambda sums: sums[..., :-1] / sums[..., -1:])
    row: Summary = {
        "measure": name,
        "label": label,
        "means": {variant: float(np.mean(values)) for variant, values in by_window.items()},
        "intervals": dict(zip(by_window, intervals, strict=True)),
    }
    if len(by_window) > 1:
        (interval,) = paired_bootstrap(columns, lambda sums: (sums[..., 1:2] - sums[..., :1]) / sums[..., -1:])
        row |= {"difference": row["means"]["trained"] - row["means"]["base"], "difference_interval": interval}
    return row


def _overall_table(summary: Summary) -> Table:
    lines = []
    for row in summary["overall"]:
        cells = [_with_interval(row["means"][variant], row["intervals"][variant]) for variant in summary["variants"]]
        if "difference" in row:
            cells.append(_with_interval(row["difference"], row["difference_interval"], "+"))
        lines.append([row["label"], *cells])
    several = ["difference"] if len(summary["variants"]) > 1 else []
    return Table(["measure", *summary["variants"], *several], lines, "Over all layers and heads")


def _layer_table(summary: Summary, settings: StatisticsSettings) -> Table:
    named = labels(settings)
    by_layer = {
        variant: {name: np.mean(means["measures"][name], axis=1) for name in named}
        for variant, means in summary["variants"].items()
    }
    lines = [
        [str(layer), *(" -> ".join(f"{means[name][row]:.3g}" for means in by_layer.values()) for name in named)]
        for row, layer in enumerate(summary["layers"])
    ]
    return Table(["layer", *named.values()], lines, f"By layer, means over heads; {' -> '.join(by_layer)}")


def _with_interval(value: float, interval: tuple[float, float] | None, sign: str = "") -> str:
    span = "" if interval is None else f" ({interval[0]:{sign}.3g} to {interval[1]:{sign}.3g})"
    return f"{value:{sign}.3g}{span}"
