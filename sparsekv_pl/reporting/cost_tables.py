"""The report's tables of cost and stability."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsekv_pl.reporting.condition import marked
from sparsekv_pl.reporting.costs import Line
from sparsekv_pl.reporting.page import Table, shorten

LEDGER_NOTE = (
    "Base and trained together, per case. If contexts of several lengths were measured, only the longest are listed; "
    "ledger.csv has all. Peak memory is the highest up to that measurement. A dense prefill is shared by all presses, "
    "and scores that do not depend on the ratio are computed once, at a press's first ratio."
)
STABILITY_NOTE = (
    "Retained importance is the share of a later token's attention to the context, under the full cache, that falls on "
    "kept pairs. Minimum, mean and variance are over the tokens of a continuation, averaged over layers and KV heads; "
    "the table has their mean over cases and the worst case (see DefensiveKV, https://arxiv.org/abs/2510.13334). "
    "Overlaps are Jaccard indices: between the pairs kept in this prompt and in one that also holds the continuation; "
    "and between the heaviest pairs for the continuation's first and second half, which shows how much the best choice "
    "itself changes."
)
_MIB = 2**20


def ledger_tables(lines: Sequence[Line]) -> list[Table]:
    """Pairs kept, bytes and speed of every condition."""
    longest: dict[tuple[Any, ...], int] = {}
    for line in lines:
        key = _place(line)
        longest[key] = max(longest.get(key, 0), line.get("length", 0))
    columns: dict[str, Callable[[Line], str]] = {
        "press": lambda line: marked(line["press"]),
        "ratio": lambda line: f"{line['compression_ratio']:.2f}",
        "prefill": lambda line: line["prefill"],
        "pairs": lambda line: line["stored"],
        "context": lambda line: _number(line.get("length"), "{:,}"),
        "pairs kept per head": lambda line: _number(line.get("kept_pairs"), "{:,.1f}"),
        "share kept": lambda line: _number(line.get("kept_share"), "{:.3f}"),
        "KV (MiB)": lambda line: _number(line.get("kv_bytes"), "{:,.2f}", _MIB),
        "peak memory (MiB)": lambda line: _number(line.get("peak_bytes"), "{:,.0f}", _MIB),
        "prefill (tokens/s)": lambda line: _number(line.get("prefill_tokens_per_second"), "{:,.0f}"),
        "eviction (ms)": lambda line: _number(line.get("eviction_seconds"), "{:,.1f}", 1e-3),
        "decode (tokens/s)": lambda line: _number(line.get("decode_tokens_per_second"), "{:,.1f}"),
        "memory": lambda line: line.get("memory") or "-",
        "error": lambda line: shorten(line.get("error")),
    }
    shown = [line for line in lines if "error" in line or line["length"] == longest[_place(line)]]
    return _without_empty_columns(columns, shown)


def _place(line: Line) -> tuple[Any, ...]:
    return line["press"], line["compression_ratio"], line["prefill"], line["stored"]


def stability_tables(lines: Sequence[Line]) -> list[Table]:
    """How stable each press's choice is."""

    def both(name: str) -> Callable[[Line], str]:
        return lambda line: " / ".join(_number(line.get(key), "{:.4f}") for key in (name, f"{name}_worst"))

    columns: dict[str, Callable[[Line], str]] = {
        "press": lambda line: marked(line["press"]),
        "ratio": lambda line: f"{line['compression_ratio']:.2f}",
        "prefill": lambda line: line["prefill"],
        "variant": lambda line: line.get("variant", "-"),
        "cases": lambda line: str(line.get("measured", "-")),
        "least retained importance, mean / worst": both("min_retained"),
        "mean retained importance, mean / worst": both("mean_retained"),
        "its variance, mean / worst": both("retained_variance"),
        "overlap with a longer prompt, mean / worst": both("overlap_prompts"),
        "overlap of the ideal sets of both halves, mean / worst": both("overlap_steps"),
        "error": lambda line: shorten(line.get("error")),
    }
    return _without_empty_columns(columns, lines)


def _without_empty_columns(columns: Mapping[str, Callable[[Line], str]], lines: Sequence[Line]) -> list[Table]:
    """One table of the columns that have a value in any line."""
    if not lines:
        return []
    cells = {name: [cell(line) for line in lines] for name, cell in columns.items()}
    kept = [name for name, column in cells.items() if set(column) - {"", "-", "- / -"}]
    return [Table(kept, list(zip(*(cells[name] for name in kept), strict=True)))]


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else form.format(value if unit == 1 else value / unit)
