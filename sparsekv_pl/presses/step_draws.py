"""Random draws of presses: seeded by the step, and by each row's tokens where rows differ.

So several ranks draw what one process with all rows would, and a resumed run draws what the first run would have.
"""

import zlib
from abc import ABC, abstractmethod
from typing import Any

from kvpress import BasePress
from torch import Tensor

from sparsekv_pl.presses.nesting import presses_in


class Draws(ABC):
    """Base class of presses whose behaviour depends on the training step."""

    @abstractmethod
    def draw(self, step: int) -> Any:
        """Prepare for optimizer step ``step``; draws depend only on the step and the press's settings."""

    def over(self, max_steps: int) -> None:  # noqa: B027 - most presses have no lengths
        """Take the training's length in optimizer steps; -1 if it has none."""


def draw(press: BasePress, step: int) -> None:
    """Prepare ``press`` and every press in it for ``step``."""
    for inner in presses_in(press):
        if isinstance(inner, Draws):
            inner.draw(step)


def last(press: BasePress, max_steps: int) -> None:
    """Let lengths in ``press`` and every press in it follow from a training of ``max_steps`` optimizer steps."""
    for inner in presses_in(press):
        if isinstance(inner, Draws):
            inner.over(max_steps)


def row_numbers(ids: Tensor) -> list[int]:
    """Hash each row of token ids (B, L) to a seed, so that a row's draws do not depend on its place in a batch."""
    return [zlib.crc32(row.tobytes()) for row in ids.cpu().numpy()]
