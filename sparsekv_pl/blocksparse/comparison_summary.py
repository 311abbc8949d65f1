"""Summarising the records of a comparison of block methods: means of agreement, scores of passes with intervals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsekv_pl.blocksparse.block_methods import DENSE, GATE, SKETCH_WALK, thresholded
from sparsekv_pl.models.batch import TEXT
from sparsekv_pl.reporting.intervals import mean_interval, paired_bootstrap, wilson_interval
from sparsekv_pl.storage.records import Record, grouped

Line = dict[str, Any]
KEYS = ("kind", "variant", "case", "task", "length", "depth", "layer", "method", "other", "budget")
"""Columns of a record that are not measures."""
ALL_LENGTHS = "all"
EXPECTED = {
    "overlap": ("block overlap of gate and Sketch&Walk", 0.3, 0.5, "0.3-0.5"),
    "jaccard": ("Jaccard similarity of gate and Sketch&Walk", 0.2, 0.4, "0.2-0.4"),
    GATE: ("sparsity of the gate", 0.7, 0.9, "0.7-0.9"),
    SKETCH_WALK: ("sparsity of Sketch&Walk", 0.75, 0.85, "about 0.8"),
}
"""Measure or method -> (name, low, high, text) that the SketchWalk document expects for Llama-3.1-8B-Instruct at 4,096
to 16,384 tokens."""


def comparison_summary(records: Sequence[Record], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Means by length over the layers that are sparse in all methods, means by layer, and the scores of the passes."""
    kinds = {kind: [record for record in records if record["kind"] == kind] for kind in ("agreement", "pair", "pass")}
    layers = sparse_layers(kinds["agreement"])
    inside = {kind: [record for record in kinds[kind] if record["layer"] in layers] for kind in ("agreement", "pair")}
    agreement = means(inside["agreement"], ["variant", "length", "method"])
    pairs = means(inside["pair"], ["variant", "length", "method", "other"])
    return {
        "sparse_layers": layers,
        "expected": expected_rows(agreement, pairs, settings),
        "agreement": agreement,
        "pairs": pairs,
        "text": text_rows(kinds["pass"]),
        "needles": needle_rows(kinds["pass"]),
        "agreement_by_layer": means(kinds["agreement"], ["variant", "length", "layer", "method"]),
        "pairs_by_layer": means(kinds["pair"], ["variant", "length", "layer", "method", "other"]),
    }


def expected_rows(
    agreement: Sequence[Line], pairs: Sequence[Line], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The document's figures beside ours, for the gate by threshold (as in the document) and by top-k."""
    rows = []
    gates = {thresholded(settings["threshold"]): "by threshold", GATE: f"top {settings['top_k_blocks']}"}
    for line in agreement:
        if line["method"] in {**gates, SKETCH_WALK: ""}:
            name = SKETCH_WALK if line["method"] == SKETCH_WALK else GATE
            how = gates.get(line["method"], f"top {settings['top_k_blocks']}")
            rows.append(_expected(line, name, how, line["sparsity"], None))
    for line in pairs:
        if line["method"] in gates and line["other"] == SKETCH_WALK:
            for measure in ("overlap", "jaccard"):
                free = line[f"{measure}_free"]
                rows.append(_expected(line, measure, f"gate {gates[line['method']]}", line[measure], free))
    return rows


def _expected(line: Line, key: str, how: str, ours: float | None, free: float | None) -> dict[str, Any]:
    quantity, low, high, expected = EXPECTED[key]
    return {
        "variant": line["variant"],
        "length": line["length"],
        "quantity": f"{quantity} ({how})",
        "expected": expected,
        "ours": ours,
        "ours_without_first_and_own": free,
        "met": None if ours is None else low <= ours <= high,
    }


def means(records: Iterable[Record], by: Sequence[str]) -> list[Line]:
    """A row per combination of ``by``: the number of ``cases``, and each measure's mean over records that have it."""
    rows = []
    for found in grouped(records, *by).values():
        names = dict.fromkeys(name for record in found for name in record if name not in KEYS)
        values = {name: [r[name] for r in found if r.get(name) is not None] for name in names}
        row: Line = {name: found[0][name] for name in by}
        row |= {name: sum(some) / len(some) if some else None for name, some in values.items()}
        rows.append(row | {"cases": len({record["case"] for record in found})})
    return rows


def sparse_layers(records: Iterable[Record]) -> list[int]:
    """The layers for which every method has an agreement record; only these are compared."""
    methods = grouped(records, "method").values()
    common = set.intersection(*({record["layer"] for record in found} for found in methods)) if methods else set()
    return sorted(common)


def text_rows(passes: Sequence[Record]) -> list[Line]:
    """A row per variant, length, method and budget: perplexity, its ratio to dense on the same windows, KL to dense."""

    def row(found: list[Record], dense: list[Record]) -> Line:
        tokens = sum(r["tokens"] for r in found)
        columns = [[r["nll"], d["nll"], r["tokens"], r["kl"]] for r, d in zip(found, dense, strict=True)]
        perplexity, ratio, kl = paired_bootstrap(columns, _scores)
        return {
            "perplexity": math.exp(sum(r["nll"] for r in found) / tokens),
            "perplexity_interval": perplexity,
            "ratio": math.exp(sum(r["nll"] - d["nll"] for r, d in zip(found, dense, strict=True)) / tokens),
            "ratio_interval": ratio,
            "kl": sum(r["kl"] for r in found) / tokens,
            "kl_interval": kl,
            "tokens": tokens,
        }

    return _pass_rows([record for record in passes if record["task"] == TEXT], row)


def needle_rows(passes: Sequence[Record]) -> list[Line]:
    """A row per variant, length, method and budget: right answers, and the difference to dense on the same cases."""

    def row(found: list[Record], dense: list[Record]) -> Line:
        right = round(sum(r["exact"] for r in found))
        differences = [r["exact"] - d["exact"] for r, d in zip(found, dense, strict=True)]
        return {
            "right": right,
            "accuracy": right / len(found),
            "accuracy_interval": wilson_interval(right, len(found)),
            "difference": sum(differences) / len(found),
            "difference_interval": mean_interval(differences),
        }

    return _pass_rows([record for record in passes if record["task"] != TEXT], row)


def _scores(sums: Any) -> Any:
    """Perplexity, its ratio to dense attention, and KL (..., 3)."""
    nll, dense, tokens, kl = (sums[..., column] for column in range(4))
    return np.stack([np.exp(nll / tokens), np.exp((nll - dense) / tokens), kl / tokens], axis=-1)


def _pass_rows(passes: list[Record], row: Callable[[list[Record], list[Record]], Line]) -> list[Line]:
    """Rows by length, and over all lengths if there are several."""
    by = ("variant", "length", "method", "budget")
    several = len({record["length"] for record in passes}) > 1
    pooled = [{**record, "length": ALL_LENGTHS} for record in passes] if several else []
    rows = []
    for records in (passes, pooled):
        dense = {(r["variant"], r["case"]): r for r in records if r["method"] == DENSE}
        for found in grouped(records, *by).values():
            paired = [dense[record["variant"], record["case"]] for record in found]
            line: Line = {**{name: found[0][name] for name in by}, "cases": len(found)}
            line["sparsity"] = sum(record["sparsity"] for record in found) / len(found)
            line["seconds"] = sum(record["seconds"] for record in found) / len(found)
            rows.append(line | row(found, paired))
    return rows
