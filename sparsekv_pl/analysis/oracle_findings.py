"""Figures from the attention of many questions over blocks: its concentration, and whether it finds the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsekv_pl.reporting.intervals import mean_interval, paired_bootstrap, wilson_interval
from sparsekv_pl.storage.records import Record

Floats = NDArray[np.float64]
SINKS = {"with sink": 0, "without sink": 1}
"""With or without block 0, which holds the attention sink -> the first block included."""
TARGETS = (0.8, 0.9, 0.95)
ATTENTION, BM25, PLACE = "attention", "BM25", "place alone"
"""Rankers of the blocks. "place alone": the mean scores of all other questions with as many blocks."""


@dataclass(frozen=True)
class Choice:
    """The report's settings: the number of hot blocks, and the layers and heads to average over (None: all).

    ``numbers`` are the model's layers that the records' rows are of, in order; None: 0, 1, 2, ...
    """

    top_k: int = 5
    layers: list[int] | None = None
    heads: list[int] | None = None
    numbers: list[int] | None = None

    def number(self, row: int) -> int:
        """Return the model's layer that a row of the records is of."""
        return row if self.numbers is None else self.numbers[row]


@dataclass(frozen=True)
class Sample:
    """One question's record, and its attention over the chosen layers and heads."""

    record: Record
    choice: Choice = field(default_factory=Choice)

    @cached_property
    def mass(self) -> Floats:
        """(layers, H, N) attention of all layers and heads on N blocks."""
        return np.asarray(self.record["mass"], np.float64)

    @cached_property
    def by_layer(self) -> Floats:
        """(layers, N) attention of all layers, averaged over the chosen heads."""
        heads = self.choice.heads
        return (self.mass if heads is None else self.mass[:, heads]).mean(1)

    @cached_property
    def scores(self) -> Floats:
        """(N,) attention averaged over the chosen heads and layers."""
        layers = self.choice.layers
        chosen = [row for row in range(len(self.by_layer)) if layers is None or self.choice.number(row) in layers]
        return self.by_layer[chosen].mean(0)

    @property
    def top(self) -> list[int]:
        """The hot blocks, hottest first."""
        return [int(block) for block in ranking(self.scores)[: self.choice.top_k]]

    @property
    def answer(self) -> list[int] | None:
        """The blocks that hold the answer; None if unknown."""
        return self.record["answer_blocks"]


def ranking(scores: ArrayLike) -> NDArray[np.int64]:
    """Block indices sorted by ``scores`` (..., N), highest first; equal scores in order of the blocks."""
    return np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")


def shares(scores: ArrayLike, first: int = 0) -> Floats:
    """(..., N - first): the share that the k hottest blocks hold of the mass from block ``first`` on, k = 1, 2, ..."""
    ordered = -np.sort(-np.asarray(scores, np.float64)[..., first:], axis=-1)
    total = ordered.sum(-1, keepdims=True)
    return np.divide(ordered, total, out=np.zeros_like(ordered), where=total > 0).cumsum(-1)


def blocks_carrying(share: float, scores: ArrayLike, first: int = 0) -> int:
    """The smallest number of blocks that hold this share of the mass from block ``first`` on."""
    return int((shares(scores, first) < share - 1e-9).sum()) + 1


def answer_rank(scores: ArrayLike, answer: Sequence[int], first: int = 0) -> NDArray[np.int64]:
    """(...): the best rank, from 1, of an answer block among the blocks from ``first`` on, by ``scores`` (..., N)."""
    wanted = [block - first for block in answer if block >= first]
    order = ranking(np.asarray(scores, np.float64)[..., first:])
    return np.isin(order, wanted).argmax(-1) + 1


def chance(blocks: int, answer: int, top_k: int) -> float:
    """The probability that ``top_k`` of ``blocks`` blocks drawn at random hold one of ``answer`` blocks."""
    return 1 - math.comb(blocks - answer, top_k) / math.comb(blocks, top_k) if top_k < blocks else 1.0


def at_least(hits: int, chances: Sequence[float]) -> float:
    """The exact probability of at least ``hits`` hits if each case has its own chance (Poisson binomial)."""
    distribution = np.ones(1)
    for p in chances:
        distribution = np.convolve(distribution, [1 - p, p])
    return float(min(1.0, distribution[hits:].sum()))


def mean(values: ArrayLike) -> dict[str, Any]:
    """Mean, median and the bootstrap interval of the mean."""
    column = np.asarray(values, np.float64)
    middle = {"mean": float(column.mean()), "median": float(np.median(column))}
    return {**middle, "interval": mean_interval(column), "cases": len(column)}


def concentration(samples: Sequence[Sample]) -> dict[str, Any]:
    """Share of the context's mass on the hottest blocks, and the number of blocks that hold most of it."""
    found: dict[str, Any] = {}
    most = max(len(sample.scores) for sample in samples)
    top_k = samples[0].choice.top_k
    for name, first in SINKS.items():
        some = [sample for sample in samples if len(sample.scores) > first]
        if not some:
            continue
        curves = np.ones((len(some), most - first))
        even = np.ones_like(curves)
        for row, sample in enumerate(some):
            blocks = len(sample.scores) - first
            curves[row, :blocks] = shares(sample.scores, first)
            even[row, :blocks] = np.arange(1, blocks + 1) / blocks
        intervals = paired_bootstrap(np.c_[curves, np.ones(len(some))], lambda sums: sums[..., :-1] / sums[..., -1:])
        at = min(top_k, most - first) - 1
        found[name] = {
            "top_share": mean(curves[:, at]),
            "top_share_if_even": float(even[:, at].mean()),
            "blocks": float(np.mean([len(sample.scores) - first for sample in some])),
            "carrying": {str(t): mean([blocks_carrying(t, s.scores, first) for s in some]) for t in TARGETS},
            "curve": curves.mean(0).tolist(),
            "curve_intervals": intervals,
            "curve_if_even": even.mean(0).tolist(),
        }
    return found


def rankers(samples: Sequence[Sample]) -> dict[str, list[Floats | None]]:
    """Ranker -> scores of each sample's blocks; None if the ranker has none."""
    return {
        ATTENTION: [sample.scores for sample in samples],
        BM25: [np.asarray(sample.record["bm25"], np.float64) for sample in samples],
        PLACE: [_elsewhere(samples, number) for number in range(len(samples))],
    }


def _elsewhere(samples: Sequence[Sample], number: int) -> Floats | None:
    others = [
        sample.scores
        for other, sample in enumerate(samples)
        if other != number and len(sample.scores) == len(samples[number].scores)
    ]
    return np.mean(others, axis=0) if others else None


def recall(samples: Sequence[Sample]) -> dict[str, Any]:
    """How often an answer block is among the hottest, by ranker, with and without the sink block.

    Without the sink block, questions whose answer lies only in block 0 are left out.
    """
    top_k, given = samples[0].choice.top_k, rankers(samples)
    found: dict[str, Any] = {}
    for name, first in SINKS.items():
        known = known_places(samples, first)
        if not known:
            continue
        rows = {ranker: [(samples[i], given[ranker][i]) for i in known] for ranker in given}
        ranks = {
            ranker: [None if scores is None else rank_in(sample, scores, first) for sample, scores in pairs]
            for ranker, pairs in rows.items()
        }
        chances = [_chances(samples[i], first) for i in known]
        found[name] = {ranker: _hits(ranks[ranker], chances, top_k) for ranker in given if any(ranks[ranker])}
        both = [(a, b) for a, b in zip(ranks[ATTENTION], ranks[BM25], strict=True) if a is not None and b is not None]
        found[name]["attention minus BM25"] = mean([float(a <= top_k) - float(b <= top_k) for a, b in both])
        found[name]["blocks"] = float(np.mean([len(samples[i].scores) - first for i in known]))
        found[name]["answer_share"] = mean([answer_share(samples[i], samples[i].scores, first) for i in known])
    return found


def known_places(samples: Sequence[Sample], first: int) -> list[int]:
    """Indices of the samples with a known answer block that is ``first`` or later."""
    return [i for i, sample in enumerate(samples) if sample.answer and max(sample.answer) >= first]


def rank_in(sample: Sample, scores: Floats, first: int) -> int:
    """The rank, from 1, of a sample's best answer block from ``first`` on by ``scores``; the block must exist."""
    assert sample.answer is not None
    return int(answer_rank(scores, sample.answer, first))


def answer_share(sample: Sample, scores: Floats, first: int) -> float:
    """The share of the mass from block ``first`` on that lies on answer blocks."""
    total = scores[first:].sum()
    return float(scores[[block for block in sample.answer or [] if block >= first]].sum() / total) if total > 0 else 0.0


def _chances(sample: Sample, first: int) -> list[float]:
    """``chance`` for 1, 2, ... drawn blocks."""
    assert sample.answer is not None
    blocks, answer = len(sample.scores) - first, sum(block >= first for block in sample.answer)
    return [chance(blocks, answer, k) for k in range(1, blocks + 1)]


def _hits(ranks: Sequence[int | None], chances: Sequence[Sequence[float]], top_k: int) -> dict[str, Any]:
    pairs = [(rank, chance) for rank, chance in zip(ranks, chances, strict=True) if rank is not None]
    at = [chance[min(top_k, len(chance)) - 1] for _, chance in pairs]
    hits, cases = sum(rank <= top_k for rank, _ in pairs), len(pairs)
    longest = max(len(chance) for _, chance in pairs)
    curve = [sum(rank <= k for rank, _ in pairs) / cases for k in range(1, longest + 1)]
    return {
        "hits": hits,
        "cases": cases,
        "recall": hits / cases,
        "interval": wilson_interval(hits, cases),
        "chance": float(np.mean(at)),
        "p_by_chance": at_least(hits, at),
        "mean_reciprocal_rank": float(np.mean([1 / rank for rank, _ in pairs])),
        "curve": curve,
        "curve_by_chance": [
            float(np.mean([chance[min(k, len(chance)) - 1] for _, chance in pairs])) for k in range(1, longest + 1)
        ],
    }


def differences(base: Sequence[Sample], trained: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Name of a figure -> mean of the paired differences, trained minus base."""
    other = {sample.record["id"]: sample for sample in trained}
    pairs = [(sample, other[sample.record["id"]]) for sample in base if sample.record["id"] in other]
    found = {}
    for name, first in SINKS.items():
        longer = [pair for pair in pairs if len(pair[0].scores) > first]
        if longer:
            tops = [[_top_share(sample, first) for sample in pair] for pair in longer]
            found[f"share of the hottest, {name}"] = mean([theirs - own for own, theirs in tops])
        known = [pairs[i] for i in known_places([sample for sample, _ in pairs], first)]
        if known:
            hits = [[rank_in(s, s.scores, first) <= s.choice.top_k for s in pair] for pair in known]
            found[f"recall, {name}"] = mean([float(theirs) - float(own) for own, theirs in hits])
    return found


def _top_share(sample: Sample, first: int) -> float:
    return float(shares(sample.scores, first)[: sample.choice.top_k][-1])
