"""What the figures of oracle hot blocks say of the sparsity hypothesis, in words that the figures choose."""

from collections.abc import Iterator, Mapping
from typing import Any

from sparsekv_pl.reporting.oracle.findings import ATTENTION, BM25, SINKS

MOSTLY = 0.8
"""The share of the attention on a document from which on it is said to lie there "mostly"."""
SURE = 0.05
"""A probability below this is not put down to chance."""


def verdict(findings: Mapping[str, Any], top_k: int) -> str:
    """What the figures say of the hypothesis, in three sentences or fewer."""
    return " ".join([*_of_concentration(findings, top_k), *_of_relevance(findings["recall"], top_k)])


def _of_concentration(findings: Mapping[str, Any], top_k: int) -> Iterator[str]:
    whole, rest = (findings["concentration"].get(name) for name in SINKS)
    if rest is None or rest["top_share_if_even"] >= MOSTLY:
        even = 1.0 if rest is None else rest["top_share_if_even"]
        yield (
            f"The documents are too short to test the hypothesis: the {top_k} hottest blocks would hold "
            f"{whole_percent(even)} of evenly spread attention."
        )
        return
    with_sink, without = whole["top_share"], rest["top_share"]
    if _holds(without):
        said = "Attention is sparse, and not only through the sink"
    elif _holds(with_sink):
        undecided = "with the sink, and without it these questions do not decide"
        said = f"Attention is sparse {undecided if _open(without) else 'only through the sink'}"
    elif _open(with_sink):
        said = "These questions do not decide whether attention is sparse"
    else:
        said = "Attention is not sparse in the sense of the hypothesis"
    yield (
        f"{said}: the {top_k} hottest blocks hold {percent(with_sink)} of the attention on the document, "
        f"{percent(without)} without the sink block (evenly spread: {whole_percent(rest['top_share_if_even'])})."
    )


def _holds(estimate: Mapping[str, Any]) -> bool:
    return estimate["interval"][0] >= MOSTLY


def _open(estimate: Mapping[str, Any]) -> bool:
    low, high = estimate["interval"]
    return low < MOSTLY <= high


def _of_relevance(recalls: Mapping[str, Any], top_k: int) -> Iterator[str]:
    rest = recalls.get("without sink")
    if rest is None:
        yield "Whether hot blocks hold the answer is not tested: no answer's place is known, or all lie in block 0."
        return
    ours, other, gap = rest[ATTENTION], rest[BM25], rest["attention minus BM25"]
    if ours["chance"] == 1:
        yield f"Whether hot blocks hold the answer is not tested: there are no more than {top_k} blocks."
        return
    more = "more often than chance" if ours["p_by_chance"] < SURE else "not clearly more often than chance"
    yield (
        f"Hot blocks hold the answer {more}: {counted(ours)} without the sink block (chance "
        f"{whole_percent(ours['chance'])}, p = {ours['p_by_chance']:.2g})."
    )
    low, high = gap["interval"]
    if low > 0 or high < 0:
        yield f"That is {'better' if low > 0 else 'worse'} than BM25, which finds {counted(other)}."
    else:
        yield f"These questions do not tell it apart from BM25, which finds {counted(other)}."


def percent(estimate: Mapping[str, Any] | None, sign: bool = False) -> str:
    """As in "81.2 % [75.0, 86.1]"."""
    if estimate is None:
        return "-"
    form = "{:+.1f}" if sign else "{:.1f}"
    span = estimate["interval"]
    interval = f" [{', '.join(form.format(100 * bound) for bound in span)}]" if span else ""
    return f"{form.format(100 * estimate['mean'])} %{interval}"


def whole_percent(share: float) -> str:
    """As in "81 %"."""
    return f"{100 * share:.0f} %"


def counted(hits: Mapping[str, Any]) -> str:
    """As in "13 of 16 (81 % [57, 93])"."""
    low, high = hits["interval"]
    return f"{hits['hits']} of {hits['cases']} ({whole_percent(hits['recall'])} [{100 * low:.0f}, {100 * high:.0f}])"
