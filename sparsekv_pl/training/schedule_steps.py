"""Lengths inside a schedule, as optimizer steps or as shares of the run (trainer.max_steps)."""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, TypeVar

Steps = int | float
"""A whole number counts optimizer steps; a number with a point, 0 to 1, is a share of the run."""

LASTING = ("warmup_steps", "steps", "boundaries")
"""Settings of schedules that are ``Steps``; the last two count from the end of the warm-up, as shares of the rest."""

Schedule = TypeVar("Schedule", bound=Any)
"""A dataclass of schedules.py."""


def check_steps(name: str, value: Steps, minimum: int) -> None:
    """Raise ``ValueError`` if ``value``, the setting ``name``, is neither at least ``minimum`` steps nor a share."""
    share = isinstance(value, float)
    if not (minimum <= value if not share else 0 <= value <= 1 and (value or not minimum)):
        raise ValueError(
            f"{name} is {value}: give {minimum} or more steps as a whole number, or a share of the run "
            f"{'above' if minimum else 'from'} 0 to 1.0"
        )


def check_boundaries(name: str, boundaries: Sequence[Steps]) -> None:
    """Raise ``ValueError`` unless ``boundaries``, the setting ``name``, are increasing steps, or increasing shares."""
    if any(a >= b for a, b in pairwise([0, *boundaries])) or len({type(boundary) for boundary in boundaries}) > 1:
        raise ValueError(
            f"{name} is {boundaries}: give steps above 0, each larger than the last, or shares of the run up to 1.0"
        )
    for boundary in boundaries:
        check_steps(name, boundary, 1)


def check_settled(schedule: Any) -> None:
    """Raise ``ValueError`` if ``schedule`` still has lengths that are shares of a run."""
    if found := _shares(schedule):
        raise ValueError(f"{type(schedule).__name__} has shares of a run, {found}: ask schedule.over(max_steps)")


def in_steps(schedule: Schedule, max_steps: int) -> Schedule:
    """Convert lengths that are shares of a run into steps, in ``schedule`` and in a schedule inside it.

    ``max_steps`` is the run's length in optimizer steps.

    Raises
    ------
    ValueError
        If there are shares and ``max_steps`` is no length (-1).
    """
    inner = getattr(schedule, "schedule", None)
    if inner is not None:
        return replace(schedule, schedule=in_steps(inner, max_steps))
    found = _shares(schedule)
    if not found:
        return schedule
    if max_steps < 1:
        name, value = next(iter(found.items()))
        raise ValueError(
            f"{type(schedule).__name__}.{name} is {value}, a share of the run, and trainer.max_steps is {max_steps}: "
            f"give max_steps, or {name} as whole numbers of steps"
        )
    warmup = getattr(schedule, "warmup_steps", 0)
    settled = {"warmup_steps": round(warmup * max_steps)} if "warmup_steps" in found else {}
    left = max(1, max_steps - settled.get("warmup_steps", warmup))
    if "steps" in found:
        settled["steps"] = max(1, round(found["steps"] * left))
    if "boundaries" in found:
        settled["boundaries"] = _apart([round(share * left) for share in found["boundaries"]])
    return replace(schedule, **settled)


def _shares(schedule: Any) -> dict[str, Any]:
    """Return the settings of ``schedule`` that are shares of a run's length."""
    lasting = {f.name: getattr(schedule, f.name) for f in fields(schedule) if f.name in LASTING}
    return {name: value for name, value in lasting.items() if _is_share(value)}


def _is_share(value: Any) -> bool:
    return any(isinstance(item, float) for item in (value if isinstance(value, list) else [value]))


def _apart(boundaries: Sequence[int]) -> list[int]:
    """Move boundaries at least one step apart: in a short run, neighbours can round to the same step."""
    apart: list[int] = []
    for boundary in boundaries:
        apart.append(max(boundary, (apart[-1] if apart else 0) + 1))
    return apart
