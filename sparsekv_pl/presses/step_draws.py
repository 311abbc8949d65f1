"""Presses that draw: anew at every step, and by the row's tokens where rows differ.

So a rank draws what one process would that has the rows of all, and a resumed run what the first one would have.
"""

import zlib
from abc import ABC, abstractmethod
from typing import Any

from kvpress import BasePress
from torch import Tensor

from sparsekv_pl.presses.nesting import presses_in


class Draws(ABC):
    """A press that does something else at every training step."""

    @abstractmethod
    def draw(self, step: int) -> Any:
        """Prepare for optimizer step ``step``; what follows depends on the step and the press's settings alone."""


def draw(press: BasePress, step: int) -> None:
    """Prepare ``press`` and every press in it for ``step``."""
    for inner in presses_in(press):
        if isinstance(inner, Draws):
            inner.draw(step)


def row_numbers(ids: Tensor) -> list[int]:
    """A number for each row of token ids (B, L): what a row draws by it is its own, wherever in a batch it stands."""
    return [zlib.crc32(row.tobytes()) for row in ids.cpu().numpy()]
