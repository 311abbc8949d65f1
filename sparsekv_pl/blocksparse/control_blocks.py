"""Controls for methods that choose key blocks: blocks drawn by chance, and the nearest ones. Neither looks at keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import block_count, first_block
from sparsekv_pl.models.seeding import generator_for


@dataclass
class RandomBlocks:
    """Scores drawn by chance, for every head by itself: the floor that a method must clear.

    A query block's scores depend on the seed, the layer and its place alone. They are the same however its tokens
    arrive, at once or one by one, and a run can be repeated.

    Parameters
    ----------
    block_size
        Tokens of a block.
    seed
        Of the draws.
    """

    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _check_block_size(self.block_size)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, Nq, Nk) in [0, 1), 0 at later blocks. See ``BlockScorer``."""
        rows, heads, queries = query.shape[:3]
        first, count = first_block(queries, key.shape[2], self.block_size), block_count(key.shape[2], self.block_size)
        scores = torch.zeros(rows, heads, count - first, count)
        for block in range(first, count):
            generator = generator_for("control blocks", self.seed, layer, block)
            scores[:, :, block - first, : block + 1] = torch.rand(rows, heads, block + 1, generator=generator)
        return scores.to(query.device)


@dataclass
class LocalBlocks:
    """The nearer, the better: with ``TopBlocks`` the first block and the most recent ones, as in StreamingLLM.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453; here in whole blocks.

    Parameters
    ----------
    block_size
        Tokens of a block.
    """

    block_size: int = 64

    def __post_init__(self) -> None:
        _check_block_size(self.block_size)

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """(B, 1, Nq, Nk), a key block's index. See ``BlockScorer``."""
        first = first_block(query.shape[2], key.shape[2], self.block_size)
        count = block_count(key.shape[2], self.block_size)
        columns = torch.arange(count, dtype=torch.float32, device=query.device)
        return columns.expand(len(query), 1, count - first, count)


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 token")
