"""Record the differentiable scores of any press while it selects."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvpress import BasePress, ScorerPress
from torch import Tensor, nn

from sparsekv_pl.presses.nesting import scorers_in


@dataclass
class CaughtScores:
    """One scorer's scores of one layer's keys."""

    layer: int
    scorer: ScorerPress
    scores: Tensor
    """(B, K, S), higher stays; S counts the keys in the cache when the press selected."""


@contextmanager
def catch_scores(press: BasePress) -> Iterator[list[CaughtScores]]:
    """Collect the scores of every scorer in ``press`` inside the block.

    The instance's ``score`` is replaced inside the block; classes do not change. Wrappers such as AdaKVPress write into
    scores, so they get a copy.
    """
    caught: list[CaughtScores] = []
    scorers = scorers_in(press)
    for scorer in scorers:
        scorer.score = partial(_score_and_record, scorer, caught)
    try:
        yield caught
    finally:
        for scorer in scorers:
            vars(scorer).pop("score", None)


def _score_and_record(
    scorer: ScorerPress, caught: list[CaughtScores], module: nn.Module, *args: Any, **kwargs: Any
) -> Tensor:
    scores = type(scorer).score(scorer, module, *args, **kwargs)
    caught.append(CaughtScores(int(module.layer_idx), scorer, scores))  # type: ignore[arg-type]
    return scores.clone()


def pinned(scores: Tensor) -> Tensor:
    """Return (B, K, S) bool, True for keys that a press keeps by rule (its window, its sinks), whatever they contain.

    kvpress presses give such keys one value above all others, so they tie for the maximum of their row's scores
    (B, K, S).
    """
    ties = scores == scores.amax((1, 2), keepdim=True)
    return ties & (ties.sum((1, 2), keepdim=True) > 1)
