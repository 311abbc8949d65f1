"""The scores of any press, caught while it selects and kept differentiable."""

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
    """What one scorer said of one layer's keys."""

    layer: int
    scorer: ScorerPress
    scores: Tensor
    """(B, K, S), higher stays; S counts the keys that were in the cache when the press selected."""


@contextmanager
def catch_scores(press: BasePress) -> Iterator[list[CaughtScores]]:
    """Collect what every scorer in ``press`` returns inside the block.

    The instance's ``score`` is shadowed for the block; classes stay as they are. Wrappers such as AdaKVPress write into
    the scores they are given, so they get a copy.
    """
    caught: list[CaughtScores] = []
    scorers = scorers_in(press)
    for scorer in scorers:
        scorer.score = partial(_score_and_note, scorer, caught)
    try:
        yield caught
    finally:
        for scorer in scorers:
            vars(scorer).pop("score", None)


def _score_and_note(
    scorer: ScorerPress, caught: list[CaughtScores], module: nn.Module, *args: Any, **kwargs: Any
) -> Tensor:
    scores = type(scorer).score(scorer, module, *args, **kwargs)
    caught.append(CaughtScores(int(module.layer_idx), scorer, scores))  # type: ignore[arg-type]
    return scores.clone()


def pinned(scores: Tensor) -> Tensor:
    """True where a press gave its highest score by rule (its window, its sinks) and not by looking.

    kvpress presses pin by padding with one value above all others, so pinned keys tie for the maximum of their row of
    scores (B, K, S).
    """
    ties = scores == scores.amax((1, 2), keepdim=True)
    return ties & (ties.sum((1, 2), keepdim=True) > 1)
