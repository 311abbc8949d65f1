"""What a sweep over lengths, depths and seeds may be: every case has an id of its own."""

from collections.abc import Sequence


def depth_text(depth: float) -> str:
    """Return a depth as ids write it."""
    return f"{depth:.2f}"


def check_sweep(lengths: Sequence[int], depths: Sequence[float], seeds: Sequence[int]) -> None:
    """Raise ``ValueError`` for a sweep without values, with one out of range, or whose cases would have equal ids."""
    for name, values in {"lengths": lengths, "depths": depths, "seeds": seeds}.items():
        if not values:
            raise ValueError(f"{name} is empty: give at least one")
    for length in lengths:
        if length < 1:
            raise ValueError(f"lengths has {length}: a context has at least 1 token")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths has {depth}: give fractions of the text between 0 and 1")
    check_distinct("lengths", lengths)
    check_distinct("depths", [depth_text(depth) for depth in depths])
    check_distinct("seeds", seeds)


def check_distinct(name: str, values: Sequence[object]) -> None:
    """Raise ``ValueError`` if a part of the cases' ids is given twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name} has {value} more than once: its cases would have equal ids")
