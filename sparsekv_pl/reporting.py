"""Results to files: before/after rows become JSON, CSV, Markdown, a picture and a terminal table."""

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

Interval = tuple[float, float]
Metric = Literal["needle_accuracy", "perplexity"]
BOOTSTRAP_RESAMPLES = 2_000
REPORTED_PACKAGES = ("torch", "lightning", "transformers", "peft", "kvpress", "torchmetrics", "datasets")


@dataclass(frozen=True)
class Row:
    """One metric under one press at one compression ratio, before and after training, on the same cases.

    `before` and `after` are fractions (needle_accuracy) or exp(nats per token) (perplexity), with their 95 %
    intervals; `cases` counts needles or text windows. `after` and `after_interval` are None where nothing was
    trained. The row of the full cache has compression_ratio 0.

    Raises ValueError for an unknown metric, a ratio outside [0, 1), no cases, a number that is not finite, or
    half an `after`.
    """

    press: str
    compression_ratio: float
    seen_in_training: bool
    metric: Metric
    before: float
    after: float | None
    before_interval: Interval
    after_interval: Interval | None
    cases: int

    def __post_init__(self) -> None:
        where = f"report row {self.press!r} at {self.compression_ratio}, {self.metric}"
        if self.metric not in get_args(Metric):
            raise ValueError(f"{where}: unknown metric; choose one of {', '.join(get_args(Metric))}")
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"{where}: compression_ratio is the fraction removed and must be in [0, 1)")
        if self.cases < 1:
            raise ValueError(f"{where}: {self.cases} cases; a score needs at least one")
        if (self.after is None) != (self.after_interval is None):
            raise ValueError(f"{where}: give both after and after_interval, or neither")
        numbers = [self.before, self.after or 0.0, *self.before_interval, *(self.after_interval or ())]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{where}: {numbers} must be finite; look for NaN in the model's outputs")


def wilson_interval(successes: int, cases: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: honest at 0 and 1, and with few cases.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if cases < 1 or not 0 <= successes <= cases:
        raise ValueError(f"{successes} successes in {cases} cases: need 0 <= successes <= cases, cases >= 1")
    z2 = _two_sided_z(confidence) ** 2
    share = successes / cases
    centre = (share + z2 / (2 * cases)) / (1 + z2 / cases)
    half = math.sqrt(z2 * (share * (1 - share) / cases + z2 / (4 * cases**2))) / (1 + z2 / cases)
    # The interval touches 0 and 1 exactly there; rounding would leave 1e-17.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == cases else centre + half)


def perplexity_interval(
    nll_sums: Sequence[float], token_counts: Sequence[int], seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of exp(sum of nll / sum of tokens), windows drawn with replacement.

    Windows are drawn, not tokens: the tokens of one text depend on each other. One window alone gives an
    interval of width zero, which says nothing. The same seed and number of windows draw the same windows.
    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979), 1-26.

    `nll_sums` holds each window's negative log-likelihood in nats, summed over its supervised tokens, and
    `token_counts` their number; `seed` decides the draws.
    """
    nll, tokens = np.asarray(nll_sums, np.float64), np.asarray(token_counts, np.float64)
    if nll.ndim != 1 or nll.shape != tokens.shape or nll.size == 0:
        raise ValueError(f"nll_sums {nll.shape} and token_counts {tokens.shape} must be 1-D, equal, not empty")
    if not (tokens > 0).all():
        raise ValueError(f"token_counts has {tokens.min():g}: drop windows without supervised tokens")
    _two_sided_z(confidence)  # only to refuse a confidence that is none
    drawn = np.random.default_rng(seed).integers(nll.size, size=(BOOTSTRAP_RESAMPLES, nll.size))
    perplexities = np.exp(nll[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    low, high = np.quantile(perplexities, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def environment() -> dict[str, object]:
    """What the numbers were measured with: Python, processors, devices, versions; nothing personal."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "packages": {name: metadata.version(name) for name in REPORTED_PACKAGES},
    }


def write_report(
    directory: str | Path,
    rows: Sequence[Row],
    training: Mapping[str, object],
    environment: Mapping[str, object],
) -> list[Path]:
    """Write report.json, .csv, .md and .png into `directory` and return their paths.

    All are rendered before one is written, and each replaces its predecessor in one step: a run that fails
    here leaves an earlier report whole. `training` and `environment` must be serialisable as JSON.
    """
    settings = _by_setting(rows)
    content = {"rows": [asdict(row) for row in rows], "training": training, "environment": environment}
    rendered = {
        "report.json": (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(),
        "report.csv": _csv(rows).encode(),
        "report.md": _markdown(settings, training, environment).encode(),
        "report.png": _png(settings),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in rendered.items():
        _replace(directory / name, data)
    return [directory / name for name in rendered]


def terminal_table(rows: Sequence[Row]) -> "Table":
    """Return a table for rich's console, full cache first: before -> after over counts and 95 % intervals."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.caption = "before -> after training, counts, 95 % intervals; unseen: a press never trained with"
    for name in ("press", "ratio", "", "needle accuracy", "perplexity"):
        table.add_column(name)
    for setting in _by_setting(rows):
        cells = [setting.lines(metric) for metric in get_args(Metric)]
        texts = [Text.assemble(first, ("\n" + "\n".join(rest), "dim")) for first, *rest in cells]
        table.add_row(setting.press, f"{setting.ratio:.2f}", setting.seen, *texts, end_section=True)
    return table


@dataclass(frozen=True)
class _Setting:
    """One line of a table: a press at a ratio, with its row of each metric."""

    press: str
    ratio: float
    seen: str
    rows: dict[Metric, Row]

    @property
    def label(self) -> str:
        name = f"{self.press} {self.ratio:.2f}" if self.ratio else self.press
        return f"{name} *" if self.seen == "unseen" else name

    def lines(self, metric: Metric) -> list[str]:
        """Return "0.05 -> 0.95", "3/64 -> 61/64" (accuracy only), "0.02-0.13 -> 0.87-0.98"."""
        row = self.rows.get(metric)
        if row is None:
            return ["-"]
        pairs = ((row.before, row.before_interval), (row.after, row.after_interval))
        known = [(value, span) for value, span in pairs if value is not None and span is not None]
        accuracy = metric == "needle_accuracy"
        scores = [f"{value:.2f}" for value, _ in known]
        counts = [f"{round(value * row.cases)}/{row.cases}" for value, _ in known]
        spans = ["-".join(f"{bound:.{2 if accuracy else 1}f}" for bound in span) for _, span in known]
        return [" -> ".join(parts) for parts in ((scores, counts, spans) if accuracy else (scores, spans))]


def _by_setting(rows: Iterable[Row]) -> list[_Setting]:
    """Group rows by press and ratio: full cache first, then in the order given."""
    settings: dict[tuple[str, float], _Setting] = {}
    for row in sorted(rows, key=lambda row: row.compression_ratio > 0):
        seen = "-" if row.compression_ratio == 0 else "seen" if row.seen_in_training else "unseen"
        new = _Setting(row.press.removesuffix("Press"), row.compression_ratio, seen, {})
        setting = settings.setdefault((row.press, row.compression_ratio), new)
        if row.metric in setting.rows:
            raise ValueError(f"two rows for {row.press} at {row.compression_ratio}, {row.metric}: keep one")
        setting.rows[row.metric] = row
    if not settings:
        raise ValueError("no rows to report: evaluate at least one press")
    return list(settings.values())


def _csv(rows: Sequence[Row]) -> str:
    """One line per row; an interval is two columns, and a missing `after` is empty."""
    flat = []
    for row in rows:
        fields = asdict(row)
        for name in ("before_interval", "after_interval"):
            fields[f"{name}_low"], fields[f"{name}_high"] = fields.pop(name) or (None, None)
        flat.append(fields)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _markdown(settings: list[_Setting], training: Mapping[str, object], environment: Mapping[str, object]) -> str:
    def table(*lines: Sequence[str]) -> list[str]:
        body = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body]

    scores = [
        [s.press, f"{s.ratio:.2f}", s.seen, *("<br>".join(s.lines(metric)) for metric in get_args(Metric))]
        for s in settings
    ]
    header = ["press", "compression ratio", "in training", "needle accuracy", "perplexity"]
    lines = ["# Before -> after training", "", *table(header, *scores), ""]
    lines += [
        "Below each score is its 95 % interval: Wilson's for accuracy, bootstrap over texts for perplexity.",
        "The compression ratio is the fraction of the KV cache removed. Before and after share their cases.",
    ]
    for title, facts in (("Training", training), ("Environment", environment)):
        told = [[name, fact if isinstance(fact, str) else json.dumps(fact)] for name, fact in facts.items()]
        lines += ["", f"## {title}", "", *table(["what", "value"], *told)]
    return "\n".join(lines) + "\n"


def _png(settings: list[_Setting]) -> bytes:
    """Draw accuracy left and perplexity right, a line per press and ratio, dots with 95 % error bars."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(11, 1.8 + 0.42 * len(settings)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, [setting.rows.get("needle_accuracy") for setting in settings])
    _draw(right, [setting.rows.get("perplexity") for setting in settings])
    left.set(title="needle accuracy (higher is better)", xlim=(-0.02, 1.02), ylim=(len(settings) - 0.5, -0.5))
    left.set_yticks(range(len(settings)), [setting.label for setting in settings])
    right.set(title="continuation perplexity (lower is better)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.supxlabel("press and compression ratio; * never seen in training; bars: 95 % intervals", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: "Axes", rows: Sequence[Row | None]) -> None:
    before = [(i - 0.14, r.before, *r.before_interval) for i, r in enumerate(rows) if r]
    after = [(i + 0.14, r.after, *r.after_interval) for i, r in enumerate(rows) if r and r.after_interval]
    for name, points, colour in (("before", before, "0.55"), ("after", after, "tab:blue")):
        y, x, low, high = np.array(points, dtype=float).reshape(-1, 4).T
        # A percentile interval may miss its own point by a hair, and matplotlib refuses a negative bar.
        bars = [np.maximum(x - low, 0), np.maximum(high - x, 0)]
        axes.errorbar(x, y, xerr=bars, fmt="o", color=colour, capsize=3, label=name)
    axes.grid(axis="x", alpha=0.3)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _two_sided_z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a probability between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)
