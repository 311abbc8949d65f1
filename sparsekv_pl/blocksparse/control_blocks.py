"""Controls for block methods that do not use the keys: random blocks, and the nearest ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import block_count, first_block
from sparsekv_pl.models.seeding import generator_for


@dataclass
class RandomBlocks:
    """Random scores, drawn for each head: the lower control of a method.

    A query block's scores depend only on the seed, the layer and the block's index, so they do not depend on whether
    its tokens arrive together or one by one.
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
    """Scores that rise with nearness: ``TopBlocks`` selects the first block and the most recent ones, as StreamingLLM.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453; here in whole blocks.
    """

    block_size: int = 64

    def __post_init__(self) -> None:
        _check_block_size(self.block_size)

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """(B, 1, Nq, Nk): each key block's index. See ``BlockScorer``."""
        first = first_block(query.shape[2], key.shape[2], self.block_size)
        count = block_count(key.shape[2], self.block_size)
        columns = torch.arange(count, dtype=torch.float32, device=query.device)
        return columns.expand(len(query), 1, count - first, count)


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 token")
