"""Tables and sentences of the oracle hot blocks' report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsekv_pl.analysis.oracle_findings import ATTENTION, BM25, PLACE, SINKS, TARGETS
from sparsekv_pl.reporting.page import Table


def mass_tables(findings: Mapping[str, Any], variants: Sequence[str], top_k: int) -> list[Table]:
    heads = [
        f"share of the {top_k} hottest",
        "evenly spread",
        *(f"blocks for {whole_percent(t)}" for t in TARGETS),
        "of",
        "questions",
    ]
    lines = []
    for variant in variants:
        for name, part in findings[variant]["concentration"].items():
            top = part["top_share"]
            carrying = [_blocks(part["carrying"][str(target)]) for target in TARGETS]
            even = whole_percent(part["top_share_if_even"])
            lines.append([variant, name, percent(top), even, *carrying, f"{part['blocks']:.1f}", str(top["cases"])])
    shares = [
        [variant, percent(findings[variant]["sink_share"]), percent(findings[variant]["beyond"])]
        for variant in variants
    ]
    tables = [
        Table(["variant", "blocks", *heads], lines, "Of the attention on the document; mean [95 %], median"),
        Table(["variant", "block 0, of the document's", "after the document, of all"], shares, "Elsewhere"),
    ]
    if "trained minus base" in findings:
        changed = [
            [name, percent(change, sign=True), str(change["cases"])]
            for name, change in findings["trained minus base"].items()
        ]
        tables.append(Table(["", "difference", "questions"], changed, "Trained minus base, question by question"))
    return tables


def _blocks(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{estimate['mean']:.1f} [{low:.1f}, {high:.1f}], {estimate['median']:g}"


def recall_tables(findings: Mapping[str, Any], variants: Sequence[str]) -> list[Table]:
    """Tables of recall by ranker; empty if no answer's block is known."""
    lines, gaps = [], []
    for variant in variants:
        for name, part in findings[variant]["recall"].items():
            for ranker in (ATTENTION, BM25, PLACE):
                if ranker in part:
                    hits = part[ranker]
                    rank = f"{hits['mean_reciprocal_rank']:.2f}"
                    chances = [whole_percent(hits["chance"]), f"{hits['p_by_chance']:.2g}"]
                    lines.append([variant, name, ranker, counted(hits), *chances, rank])
            blocks, gap = f"{part['blocks']:.1f}", percent(part["attention minus BM25"], sign=True)
            gaps.append([variant, name, blocks, gap, percent(part["answer_share"])])
    if not lines:
        return []
    heads = ["variant", "blocks", "ranked by", "found", "chance", "p", "mean 1 / rank"]
    return [
        Table(heads, lines, "Questions whose answer is among the hottest blocks"),
        Table(
            ["variant", "blocks", "of so many", "attention minus BM25", "attention on the answer's blocks"],
            gaps,
            "Attention against BM25, and how much of it the answer's blocks get",
        ),
    ]


def best_lines(findings: Mapping[str, Any], variants: Sequence[str]) -> Iterator[str]:
    """Yield a sentence about each variant's best head."""
    for variant in variants:
        best = findings[variant]["best_head"]
        if best is not None:
            same, other = best["all"], best["other_half"]
            yield (
                f"{variant}: the best single head without the sink block, chosen on the same questions, is "
                f"{_head(same)} with {counted(same)}, which is too optimistic. Chosen on every second question "
                f"({_head(other)}) and tested on the others it finds {counted(other)}."
            )


def _head(best: Mapping[str, Any]) -> str:
    return f"head {best['head']} of layer {best['layer']}"


def layer_table(rows: Sequence[Mapping[str, Any]], variant: str, top_k: int) -> Table:
    """A table with a line per layer."""
    heads = ["layer", "block 0", "after the document"]
    for name in SINKS:
        heads += [f"{top_k} hottest, {name}", f"recall, {name}"]
    lines = []
    for row in rows:
        line = [str(row["layer"]), percent(row["sink_share"]), percent(row["beyond"])]
        for name in SINKS:
            line += [percent(row[name]["top_share"]), counted(row[name]) if row[name]["cases"] else "-"]
        lines.append([*line, percent(row["without sink"].get("answer_share"))])
    return Table([*heads, "answer's blocks, without sink"], lines, f"{variant}, by layer")


def figures_line(findings: Mapping[str, Any], top_k: int) -> str:
    """One line with a variant's main figures: the hottest blocks' share of the attention, and their recall."""
    parts = findings["concentration"].items()
    held = [
        f"{percent(part['top_share'])} {name} (evenly spread: {whole_percent(part['top_share_if_even'])})"
        for name, part in parts
    ]
    shares = f"share of the attention on the document in the {top_k} hottest blocks: {', '.join(held)}"
    rest = findings["recall"].get("without sink")
    if rest is None:
        return f"{shares}; the answer's block is unknown, or block 0"
    found = [f"{counted(rest[ranker])} by {ranker}" for ranker in (ATTENTION, BM25, PLACE) if ranker in rest]
    ours = rest[ATTENTION]
    chances = f"chance {whole_percent(ours['chance'])}, p = {ours['p_by_chance']:.2g}"
    gap = percent(rest["attention minus BM25"], sign=True)
    return f"{shares}; without the sink block the answer is among them {', '.join(found)} ({chances}; minus BM25 {gap})"


def percent(estimate: Mapping[str, Any] | None, sign: bool = False) -> str:
    """Format a mean share and its interval: "81.2 % [75.0, 86.1]"."""
    if estimate is None:
        return "-"
    form = "{:+.1f}" if sign else "{:.1f}"
    span = estimate["interval"]
    interval = f" [{', '.join(form.format(100 * bound) for bound in span)}]" if span else ""
    return f"{form.format(100 * estimate['mean'])} %{interval}"


def whole_percent(share: float) -> str:
    """Format a share: "81 %"."""
    return f"{100 * share:.0f} %"


def counted(hits: Mapping[str, Any]) -> str:
    """Format a count with its share and interval: "13 of 16 (81 % [57, 93])"."""
    low, high = hits["interval"]
    return f"{hits['hits']} of {hits['cases']} ({whole_percent(hits['recall'])} [{100 * low:.0f}, {100 * high:.0f}])"
