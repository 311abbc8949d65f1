"""BlockDropoutPress: drop blocks of a fixed length in training."""

from dataclasses import dataclass

from torch import Tensor

from sparsekv_pl.presses.span_dropout import Shown, SpanDropoutPress


@dataclass
class BlockDropoutPress(SpanDropoutPress):
    """Drop random blocks of neighbouring tokens in training, so that a model does not rely on any one of them.

    SparseKV's block dropout, on a cache that really shrinks. See ``SpanDropoutPress`` for the rules and parameters that
    blocks share with other spans.

    Parameters
    ----------
    block_size
        Tokens per block, counted from the first key in the cache. The last block may be shorter.

    Raises
    ------
    ValueError
        If ``block_size`` is below 1.
    """

    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least("block_size", 1)

    def most_spans(self, shown: Shown) -> int:
        """See ``SpanDropoutPress``."""
        return -(-shown.keys.shape[2] // self.block_size)

    def spans(self, shown: Shown) -> Tensor:
        """See ``SpanDropoutPress``."""
        return shown.place.clamp(min=0)[:, None] // self.block_size
