"""Record the differentiable scores of any press while it selects."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kvpress import BasePress, ScorerPress
from torch import Tensor, nn

from sparsekv_pl.presses.nesting import scorers_in
from sparsekv_pl.presses.shadowed_method import shadowed

LEAST_DEVIATION = 1e-9


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
    with ExitStack() as stack:
        for scorer in {id(found): found for found in scorers_in(press)}.values():  # one object may be in a press twice
            stack.enter_context(shadowed(scorer, "score", partial(_score_and_record, scorer, caught)))
        yield caught


def _score_and_record(
    scorer: ScorerPress,
    caught: list[CaughtScores],
    score: Callable[..., Tensor],
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    scores = score(module, *args, **kwargs)
    caught.append(CaughtScores(int(module.layer_idx), scorer, scores))  # type: ignore[arg-type]
    return scores.clone()


def pinned(scores: Tensor) -> Tensor:
    """Return (B, K, S) bool, True for keys that a press keeps by rule (its window, its sinks), whatever they contain.

    kvpress presses give such keys one value above all others, so they tie for the maximum of their row's scores
    (B, K, S).
    """
    ties = scores == scores.amax((1, 2), keepdim=True)
    return ties & (ties.sum((1, 2), keepdim=True) > 1)


def standardised(scores: Tensor, among: Tensor) -> Tensor:
    """Return scores (B, K, S) with a mean of 0 and a deviation of 1 over each head's keys ``among``; 0 elsewhere."""
    count = among.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(among, scores, 0).sum(-1, keepdim=True) / count
    centred = torch.where(among, scores - mean, 0)
    # Clamped before the root, whose gradient at 0 would be NaN if all scores are equal.
    deviation = (centred.square().sum(-1, keepdim=True) / count).clamp(min=LEAST_DEVIATION**2).sqrt()
    return centred / deviation
