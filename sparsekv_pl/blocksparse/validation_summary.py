"""Summary of a validation by length and by layer, with the expected figures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from sparsekv_pl.reporting.page import Section, Table
from sparsekv_pl.storage.records import Record, grouped

SUMMED_UP = """
    actual_sparsity block_sparsity cosine_similarity mse max_error dense_time_ms sparse_time_ms speedup
""".split()


@dataclass(frozen=True)
class Expected:
    """An expected figure for the mean (or the largest value) over the files of layers that are not kept dense."""

    name: str
    text: str
    field: str
    low: float = -math.inf
    high: float = math.inf
    of: Literal["mean", "max"] = "mean"
    length: int | None = None
    """The only length in tokens for which it is expected; None: all."""


EXPECTED = (
    Expected("cosine similarity", "> 0.95", "cosine_similarity", low=0.95),
    Expected("mean squared error", "< 0.01", "mse", high=0.01),
    Expected("largest error", "< 0.1", "max_error", high=0.1, of="max"),
    Expected("sparsity", "about 0.8", "actual_sparsity", low=0.75, high=0.85),
    Expected("speed-up", "1.5 to 3", "speedup", low=1.5, length=8192),
    Expected("speed-up", "2 to 5", "speedup", low=2, length=16384),
)
"""Expected figures for Llama-3.1-8B-Instruct at 4,096 to 16,384 tokens with default settings. Higher speed-ups meet
them too."""

EXPLAINED = (
    "Expected figures are for Llama-3.1-8B-Instruct at 4,096 to 16,384 tokens. Ours are means over the files of layers "
    "that are not kept dense (for the largest error, the maximum); 0.75 to 0.85 meets about 0.8.",
    "Cosine similarity is between a query's dense and sparse output in one head, averaged over queries and heads. "
    "Sparsity is the share of the causal query-key pairs that was not computed. Times are medians of several turns; "
    "sparse time includes the selection.",
)


def summary(records: Sequence[Record], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Content of validation_summary_{timestamp}.json.

    ``records`` are those of ``validation.validated`` with a sample_id, or {"file", "refused"}.
    """
    refused = [record for record in records if "refused" in record]
    measured = [record for record in records if "refused" not in record]
    by_length = {str(n): _summed_up(own) for n, own in _by(measured, "seq_len")}
    for length, own in _by([record for record in measured if not record["kept_dense"]], "seq_len"):
        by_length[str(length)]["sparse_layers"] = _summed_up(own)
    return {
        "settings": dict(settings),
        "files": len(measured),
        "refused": [{"file": record["file"], "reason": record["refused"]} for record in refused],
        "expected": list(_expectations(measured)),
        "by_length": by_length,
        "by_layer": {str(layer): _summed_up(own) for layer, own in _by(measured, "layer_idx")},
        "by_length_and_layer": {
            str(length): {str(layer): _summed_up(some) for layer, some in _by(own, "layer_idx")}
            for length, own in _by(measured, "seq_len")
        },
    }


def sections(content: Mapping[str, Any]) -> list[Section]:
    """Sections of the report on a ``summary``'s content."""
    page = [
        Section("Expected and measured", paragraphs=EXPLAINED, tables=[expected_table(content)]),
        Section("By length", tables=[_length_table(content)], paragraphs=["Without the layers that are kept dense."]),
        Section("By layer", tables=[_layer_table(content)]),
    ]
    refused = [[entry["file"], entry["reason"]] for entry in content["refused"]]
    return [*page, Section("Refused files", tables=[Table(["file", "reason"], refused)])] if refused else page


def expected_table(content: Mapping[str, Any]) -> Table:
    """A table of expected and measured figures from a ``summary``'s content, with a line per figure and length."""
    verdicts = {True: "yes", False: "no", None: "not measured"}
    lines = [
        [entry["name"], entry["expected"], str(entry["seq_len"] or "-"), _short(entry["here"]), verdicts[entry["met"]]]
        for entry in content["expected"]
    ]
    return Table(["", "expected", "tokens", "here", "met"], lines)


def _expectations(measured: Sequence[Record]) -> Iterable[dict[str, Any]]:
    by_length = dict(_by([record for record in measured if not record["kept_dense"]], "seq_len"))
    for expected in EXPECTED:
        lengths: list[int | None] = [expected.length] if expected.length else [*by_length] or [None]
        for length in lengths:
            own = [record[expected.field] for record in by_length.get(length, [])] if length else []
            here = None if not own else (max if expected.of == "max" else mean)(own)
            yield {
                "name": expected.name,
                "expected": expected.text,
                "seq_len": length,
                "here": here,
                "met": None if here is None else expected.low <= here <= expected.high,
            }


def _length_table(content: Mapping[str, Any]) -> Table:
    header = ["tokens", "files", "sparsity", "cosine: mean", "lowest", "MSE", "largest error", "dense ms", "sparse ms"]
    lines = []
    for length, own in content["by_length"].items():
        sums = own.get("sparse_layers")
        if sums is None:
            lines.append([length, "0", *"-" * 10])
            continue
        cosine, speedup = sums["cosine_similarity"], sums["speedup"]
        means = [sums[name]["mean"] for name in ("dense_time_ms", "sparse_time_ms")]
        numbers = [sums["actual_sparsity"]["mean"], cosine["mean"], cosine["min"], sums["mse"]["mean"]]
        numbers += [sums["max_error"]["max"], *means, speedup["mean"], speedup["min"], speedup["max"]]
        lines.append([length, str(sums["count"]), *map(_short, numbers)])
    return Table([*header, "speed-up: mean", "lowest", "highest"], lines)


def _layer_table(content: Mapping[str, Any]) -> Table:
    lines = []
    for length, layers in content["by_length_and_layer"].items():
        for layer, sums in layers.items():
            names = ("actual_sparsity", "cosine_similarity", "mse", "speedup")
            numbers = [sums[name]["mean"] for name in names]
            numbers.insert(3, sums["max_error"]["max"])
            kept = "dense" if sums["kept_dense"] == sums["count"] else "sparse"
            lines.append([length, layer, kept, str(sums["count"]), *map(_short, numbers)])
    return Table(["tokens", "layer", "", "files", "sparsity", "cosine", "MSE", "largest error", "speed-up"], lines)


def _summed_up(records: Sequence[Record]) -> dict[str, Any]:
    columns = {name: [record[name] for record in records] for name in SUMMED_UP}
    sums = {name: {"mean": mean(values), "min": min(values), "max": max(values)} for name, values in columns.items()}
    return {"count": len(records), "kept_dense": sum(record["kept_dense"] for record in records), **sums}


def _by(records: Iterable[Record], column: str) -> list[tuple[int, list[Record]]]:
    return sorted(grouped(records, column).items())


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}" if abs(number) < 100 else f"{number:.0f}"
