"""Walk through presses inside presses, and name them."""

from collections.abc import Iterator

from kvpress import BasePress, ScorerPress
from torch import nn


def presses_in(press: BasePress) -> Iterator[BasePress]:
    """Yield ``press`` and every press that it wraps, outermost first."""
    yield press
    for inner in wrapped(press):
        yield from presses_in(inner)


def scorers_in(press: BasePress) -> list[ScorerPress]:
    """Return the scorers that select; of a scorer around a scorer (CriticalKVPress), the outer one."""
    if isinstance(press, ScorerPress):
        return [press]
    return [scorer for inner in wrapped(press) for scorer in scorers_in(inner)]


def scorer_names(press: BasePress | None) -> list[str]:
    """Return the names of ``scorers_in``, each once; empty without a press."""
    return [] if press is None else list(dict.fromkeys(press_name(scorer) for scorer in scorers_in(press)))


def wrapped(press: BasePress) -> list[BasePress]:
    """Return the presses that ``press`` wraps directly."""
    # Not the dataclass fields: CriticalKVPress keeps the press inside it in a plain attribute.
    values = [value if isinstance(value, (list, tuple)) else [value] for value in vars(press).values()]
    return [inner for value in values for inner in value if isinstance(inner, BasePress)]


def learnable(press: BasePress) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of ``press`` and of presses in it (SoftThresholdPress's threshold), by name."""
    return {
        f"{index}_{press_name(inner).partition('(')[0]}_{name}": value
        for index, inner in enumerate(presses_in(press))
        for name, value in vars(inner).items()
        if isinstance(value, nn.Parameter)
    }


def press_name(press: BasePress | None) -> str:
    """Name a press for reports: SnapKVPress -> SnapKV, AdaKVPress(SnapKVPress) -> AdaKV(SnapKV), None -> full cache."""
    if press is None:
        return "full cache"
    inner = [press_name(item) for item in list(presses_in(press))[1:2]]
    name = type(press).__name__.removesuffix("Press")
    return f"{name}({inner[0]})" if inner else name
