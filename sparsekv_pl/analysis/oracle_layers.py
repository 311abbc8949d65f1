"""Hot blocks by layer and by head, and the best head, chosen after the measurement."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv_pl.analysis.oracle_findings import (
    SINKS,
    Choice,
    Floats,
    Sample,
    answer_rank,
    answer_share,
    known_places,
    mean,
    rank_in,
    shares,
)
from sparsekv_pl.reporting.intervals import wilson_interval


def by_layer(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Figures of hot blocks for each layer, averaged over the chosen heads."""
    number = samples[0].choice.number
    return [
        {"layer": number(row)} | _layer(samples, [sample.by_layer[row] for sample in samples])
        for row in range(len(samples[0].by_layer))
    ]


def _layer(samples: Sequence[Sample], scores: Sequence[Floats]) -> dict[str, Any]:
    top_k = samples[0].choice.top_k
    row: dict[str, Any] = {
        "beyond": mean([1 - s.sum() for s in scores]),
        "sink_share": mean([s[0] / s.sum() if s.sum() > 0 else 0.0 for s in scores]),
    }
    for name, first in SINKS.items():
        tops = [shares(s, first)[:top_k][-1] for s in scores if len(s) > first]
        known = known_places(samples, first)
        ranks = [rank_in(samples[i], scores[i], first) for i in known]
        hits = sum(rank <= top_k for rank in ranks)
        row[name] = {"top_share": mean(tops) if tops else None, "hits": hits, "cases": len(ranks)}
        if ranks:
            row[name] |= {"recall": hits / len(ranks), "interval": wilson_interval(hits, len(ranks))}
            row[name]["answer_share"] = mean([answer_share(samples[i], scores[i], first) for i in known])
    return row


def head_recall(samples: Sequence[Sample]) -> Floats | None:
    """(layers, H): recall of the answer's block without the sink block; None if no answer's block is known."""
    ranks = _head_ranks(samples)
    return None if ranks is None else (ranks <= samples[0].choice.top_k).mean(0)


def best_head(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """The head that finds the answer most often without the sink block, with two figures.

    "all" is chosen and tested on the same questions, so it is too optimistic. "other_half" is chosen on every second
    question and tested on the others. None with fewer than four questions with a known answer block.
    """
    ranks, choice = _head_ranks(samples), samples[0].choice
    if ranks is None or len(ranks) < 4:
        return None
    return {"all": _tested(ranks, ranks, choice), "other_half": _tested(ranks[::2], ranks[1::2], choice)}


def _tested(chosen_on: NDArray[np.int64], tested_on: NDArray[np.int64], choice: Choice) -> dict[str, Any]:
    merit = (chosen_on <= choice.top_k).mean(0) + 1e-3 * (1 / chosen_on).mean(0)  # ranks break ties
    row, head = (int(i) for i in np.unravel_index(merit.argmax(), merit.shape))
    hits, cases = int((tested_on[:, row, head] <= choice.top_k).sum()), len(tested_on)
    interval, layer = wilson_interval(hits, cases), choice.number(row)
    return {"layer": layer, "head": head, "hits": hits, "cases": cases, "recall": hits / cases, "interval": interval}


def _head_ranks(samples: Sequence[Sample]) -> NDArray[np.int64] | None:
    """(questions, layers, H): ranks of the answer's block; None if no answer's block is known."""
    known = [samples[i] for i in known_places(samples, 1)]
    return np.stack([answer_rank(sample.mass, sample.answer or [], 1) for sample in known]) if known else None
