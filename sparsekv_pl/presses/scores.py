"""The scores of any press, caught while it selects and kept differentiable; and what can be set on any press."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CriticalAdaKVPress,
    DMSPress,
    DuoAttentionPress,
    FastKVzipPress,
    FinchPress,
    KeyRerotationPress,
    KVComposePress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    LUKVPress,
    NonCausalAttnPress,
    PyramidKVPress,
    RandomPress,
    ScorerPress,
    StreamingLLMPress,
)
from torch import Tensor, nn

from sparsekv_pl.schedules import check_compression_ratio

UNTRAINABLE = (RandomPress, StreamingLLMPress)
"""Scorers that look at no weight of the model: there is nothing in their scores to train."""

ONE_CHUNK = (
    AdaKVPress,
    BlockPress,
    ChunkPress,
    CompactorPress,
    CriticalAdaKVPress,
    DMSPress,
    DuoAttentionPress,
    FastKVzipPress,
    FinchPress,
    KVComposePress,
    KVzipPress,
    LeverageScorePress,
    LUKVPress,
    NonCausalAttnPress,
    PyramidKVPress,
)
"""Presses that mask pairs instead of removing them, or that look at the whole context at once: not for many chunks.
PyramidKVPress would share out its budget over layers anew at every chunk, each time of what is left."""


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
    for inner in _wrapped(press):
        yield from presses_in(inner)


def scorers_in(press: BasePress) -> list[ScorerPress]:
    """The scorers that decide: a scorer around a scorer (CriticalKVPress) hides the inner one."""
    if isinstance(press, ScorerPress):
        return [press]
    return [scorer for inner in _wrapped(press) for scorer in scorers_in(inner)]


def _wrapped(press: BasePress) -> list[BasePress]:
    # Not the dataclass fields: CriticalKVPress keeps the press inside it in a plain attribute.
    values = [value if isinstance(value, (list, tuple)) else [value] for value in vars(press).values()]
    return [inner for value in values for inner in value if isinstance(inner, BasePress)]


def trainable_scorers(press: BasePress) -> list[ScorerPress]:
    """The scorers in ``press`` whose scores depend, differentiably, on the model."""
    return [
        scorer
        for scorer in scorers_in(press)
        if not isinstance(scorer, UNTRAINABLE)
        and getattr(scorer, "scores_train", True)
        and not (isinstance(scorer, LagKVPress) and not scorer.cross_scoring)  # its score is a rank
    ]


def learnable(press: BasePress) -> dict[str, nn.Parameter]:
    """The parameters that presses in ``press`` have of their own (SoftThresholdPress's threshold), by name."""
    return {
        f"{index}_{press_name(inner).partition('(')[0]}_{name}": value
        for index, inner in enumerate(presses_in(press))
        for name, value in vars(inner).items()
        if isinstance(value, nn.Parameter)
    }


def only_trains(press: BasePress) -> bool:
    """Whether ``press`` lets everything pass in evaluation, so that it cannot say how a model stands eviction."""
    return all(getattr(inner, "only_trains", False) for inner in presses_in(press) if not _wrapped(inner))


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


def set_compression_ratio(press: BasePress, ratio: float) -> None:
    """Set the fraction of KV pairs that ``press`` removes.

    Raises
    ------
    ValueError
        For a ratio outside [0, 1), and for a press that has none to set (ComposedPress, and those with a fixed rule).
    """
    # Not hasattr(press, ...): some presses raise when their ratio is read before a forward.
    has_ratio = "compression_ratio" in vars(press) or hasattr(type(press), "compression_ratio")
    if has_ratio and not isinstance(press, ComposedPress):
        check_compression_ratio("compression_ratio", ratio)
        with suppress(AttributeError):  # kvpress's way to say that the ratio follows from other settings
            press.compression_ratio = ratio
            return
    raise ValueError(
        f"{press_name(press)} has no compression_ratio to set: set it on the presses inside, or wrap one press alone"
    )


def compression_ratio_of(press: BasePress) -> float:
    """The fraction of KV pairs that ``press`` is set to remove. ``ValueError`` where it does not say."""
    with suppress(AttributeError, AssertionError):  # which of them is up to the press
        if (ratio := press.compression_ratio) is not None:
            return float(ratio)
    raise ValueError(f"{press_name(press)} has no compression_ratio of its own: name a press that has one")


def written_ratio(press: BasePress | None) -> str | None:
    """The ratio that was written in ``press`` or in one inside it (``SnapKV.compression_ratio=0.5``), if one was."""
    for inner in () if press is None else presses_in(press):
        ratio = vars(inner).get("compression_ratio")
        if ratio and ratio != getattr(type(inner), "compression_ratio", None):
            return f"{press_name(inner)}.compression_ratio={ratio}"
    return None


def rerotates_keys(press: BasePress | None) -> bool:
    """Whether kept keys move to positions 0..budget-1, so that what follows continues from the cache's length."""
    if press is None:
        return False
    return any(
        isinstance(inner, KeyRerotationPress) or (isinstance(inner, FinchPress) and inner.rerotate_keys)
        for inner in presses_in(press)
    )


def observation_window(press: BasePress | None) -> int:
    """Tokens that a press looks at or keeps by rule: a chunk must be longer than this. 0 for a press without such."""
    if press is None:
        return 0
    names = ("window_size", "n_sink")
    return max(int(getattr(inner, name, None) or 0) for inner in presses_in(press) for name in names)
