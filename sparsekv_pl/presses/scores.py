"""The scores of any press, caught while it selects and kept differentiable; presses inside presses, and their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvpress import BasePress, ScorerPress
from torch import Tensor, nn


@dataclass
class CaughtScores:
    """What one scorer said of one layer's keys."""

    layer: int
    scorer: ScorerPress
    scores: Tensor
    """(B, K, S), higher stays; S counts the keys that were in the cache when the press selected."""


def presses_in(press: BasePress) -> Iterator[BasePress]:
    """``press`` and every press that it wraps, outermost first."""
    yield press
    for inner in wrapped(press):
        yield from presses_in(inner)


def scorers_in(press: BasePress) -> list[ScorerPress]:
    """The scorers that decide: a scorer around a scorer (CriticalKVPress) hides the inner one."""
    if isinstance(press, ScorerPress):
        return [press]
    return [scorer for inner in wrapped(press) for scorer in scorers_in(inner)]


def wrapped(press: BasePress) -> list[BasePress]:
    """The presses that ``press`` wraps, without those inside them."""
    # Not the dataclass fields: CriticalKVPress keeps the press inside it in a plain attribute.
    values = [value if isinstance(value, (list, tuple)) else [value] for value in vars(press).values()]
    return [inner for value in values for inner in value if isinstance(inner, BasePress)]


def learnable(press: BasePress) -> dict[str, nn.Parameter]:
    """The parameters that presses in ``press`` have of their own (SoftThresholdPress's threshold), by name."""
    return {
        f"{index}_{press_name(inner).partition('(')[0]}_{name}": value
        for index, inner in enumerate(presses_in(press))
        for name, value in vars(inner).items()
        if isinstance(value, nn.Parameter)
    }


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


def press_name(press: BasePress | None) -> str:
    """SnapKVPress -> SnapKV, AdaKVPress(SnapKVPress) -> AdaKV(SnapKV), None -> full cache."""
    if press is None:
        return "full cache"
    inner = [press_name(item) for item in list(presses_in(press))[1:2]]
    name = type(press).__name__.removesuffix("Press")
    return f"{name}({inner[0]})" if inner else name
