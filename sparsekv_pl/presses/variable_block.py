"""VariableBlockPress: drop blocks of random lengths in training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv_pl.presses.span_dropout import Shown, SpanDropoutPress

LENGTHS = 1
"""The stream of draws for the blocks' lengths."""


@dataclass
class VariableBlockPress(SpanDropoutPress):
    """Drop random blocks of random lengths in training, so that a model cannot learn block boundaries.

    Every row and KV head gets new blocks at every step (all heads and layers the same ones if ``shared``). See
    ``SpanDropoutPress`` for the parameters not listed here.

    Parameters
    ----------
    shortest, longest
        Tokens per block, drawn uniformly between the two, both included. The last block may be shorter.

    Raises
    ------
    ValueError
        If ``shortest`` is below 1 or ``longest`` below ``shortest``.
    """

    shortest: int = 16
    longest: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least("shortest", 1)
        self.check_at_least("longest", self.shortest)

    def spans(self, shown: Shown) -> Tensor:
        """See ``SpanDropoutPress``."""
        most = -(-shown.keys.shape[2] // self.shortest)
        kinds = self.longest - self.shortest + 1
        longer = (self.uniform(shown, most, LENGTHS) * kinds).long().clamp(max=kinds - 1)
        ends = (self.shortest + longer).cumsum(-1)
        place = shown.place.clamp(min=0)[:, None].expand(-1, ends.shape[1], -1)
        return torch.searchsorted(ends, place.contiguous(), right=True)
