"""The chunks that a context is cut into, and how many pairs stay after each."""

from collections.abc import Sequence
from itertools import pairwise


def chunk_bounds(tokens: int, chunk_tokens: int | None) -> list[tuple[int, int]]:
    """Cut ``tokens`` into the fewest chunks of at most ``chunk_tokens``; return (start, stop) of each.

    Their lengths differ by at most one token. None makes one chunk; no tokens make no chunk of a given length.
    """
    count = 1 if chunk_tokens is None else -(-tokens // chunk_tokens)
    edges = [tokens * i // max(1, count) for i in range(count + 1)]
    return list(pairwise(edges))


def exceed_window(tokens: int, chunk_tokens: int | None, window: int) -> bool:
    """Return whether every chunk of ``tokens`` is longer than a press's ``window``, so that it can evict from each."""
    return min(stop - start for start, stop in chunk_bounds(tokens, chunk_tokens)) > window


def staying(held: int, seen: int, ratio: float, budget: int | None) -> int:
    """Return how many of ``held`` pairs stay: ``seen * (1 - ratio)``, at most ``budget`` and at least 1."""
    return max(1, min(int(seen * (1 - ratio)), held, budget or held))


def chunk_ratio(held: int, seen: int, ratio: float, budget: int | None) -> float:
    """Return the ratio at which kvpress keeps ``staying`` of the ``held`` pairs."""
    target = staying(held, seen, ratio, budget)
    # kvpress rounds held * (1 - ratio) down: half a pair more is safe.
    return 0.0 if target >= held else 1 - (target + 0.5) / held


def most_positions(bounds: Sequence[tuple[int, int]], rotates: bool, ratio: float | None, budget: int | None) -> int:
    """Return the largest number of RoPE positions in use at once in chunks of these ``bounds``.

    ``rotates`` is True if kept keys are re-rotated; ``ratio`` is None if nothing is evicted between chunks.
    """
    if not rotates or ratio is None:
        return bounds[-1][1]
    held, most = 0, 0
    for start, stop in bounds:
        most = max(most, held + stop - start)
        held = staying(held + stop - start, stop, ratio, budget)
    return most
