"""Key blocks that query blocks attend to: how they are chosen from scores, and what may be chosen at all.

Blocks start at position 0, for queries and keys alike; the last one may be shorter. With T new queries over S keys the
query blocks are those that the last T positions touch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NOTHING = -1
"""Stands where a query block has fewer key blocks than others."""


def block_count(tokens: int, block_size: int) -> int:
    """Blocks that ``tokens`` tokens take."""
    return -(-tokens // block_size)


def first_block(queries: int, keys: int, block_size: int) -> int:
    """The block that the first of the last ``queries`` positions of ``keys`` is in."""
    return (keys - queries) // block_size


def visible_blocks(queries: int, keys: int, block_size: int, device: torch.device | None = None) -> Tensor:
    """(Nq, Nk) bool: the key blocks at or before each query block."""
    first, count = first_block(queries, keys, block_size), block_count(keys, block_size)
    rows = torch.arange(first, count, device=device)
    return torch.arange(count, device=device) <= rows[:, None]


@dataclass(frozen=True)
class Blocks:
    """The key blocks of every query block.

    A query block's own block is always among them, so that every query sees itself; later blocks never are.
    """

    indices: Tensor
    """(B, G, Nq, k) int64, ascending, ``NOTHING`` at the end. G is 1 (all heads share) or the number of query heads."""
    block_size: int
    keys: int
    """S, the number of keys."""

    @property
    def first(self) -> int:
        """The block of the first query row."""
        return block_count(self.keys, self.block_size) - self.indices.shape[2]

    def mask(self) -> Tensor:
        """(B, G, Nq, Nk) bool, True where selected."""
        count = block_count(self.keys, self.block_size)
        selected = torch.zeros(*self.indices.shape[:3], count + 1, dtype=torch.bool, device=self.indices.device)
        selected.scatter_(-1, self.indices.where(self.indices != NOTHING, count), True)
        return selected[..., :count]

    def sparsity(self) -> Tensor:
        """(B, G): of the blocks that queries could see, the share that they do not."""
        rows = torch.arange(self.first, self.first + self.indices.shape[2], device=self.indices.device) + 1
        return 1 - (self.indices != NOTHING).sum((2, 3)) / rows.sum()


def blocks_of(mask: Tensor, block_size: int, keys: int) -> Blocks:
    """The blocks that ``mask`` (B, G, Nq, Nk) bool selects; own blocks are added and later ones taken out."""
    count = mask.shape[-1]
    rows = torch.arange(count - mask.shape[2], count, device=mask.device)
    columns = torch.arange(count, device=mask.device)
    selected = mask & (columns <= rows[:, None]) | (columns == rows[:, None])
    width = int(selected.sum(-1).max())
    indices = torch.where(selected, columns, count).sort(-1).values[..., :width]
    return Blocks(indices.where(indices < count, NOTHING), block_size, keys)


class BlockScorer(Protocol):
    """Says how much each query block wants each key block; may keep state from layer to layer and step to step.

    A new context (as many queries as keys) begins anew. Keys that follow an eviction have no blocks: ValueError.
    """

    block_size: int

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """(B, G, Nq, Nk) float32, higher is wanted more; what stands at later blocks is not looked at. None: dense.

        ``query`` (B, H, T, D) are the last T of the S positions of ``key`` (B, K, S, D), both after RoPE.
        """


Selector = Callable[[int, Tensor, Tensor], Blocks | None]
"""Called with layer_idx, queries and keys as a BlockScorer is; None for dense attention."""


@dataclass
class TopBlocks:
    """Selects the ``top_k`` best blocks of a scorer, the first and the query's own among them.

    Parameters
    ----------
    scorer
        Whose scores.
    top_k
        Key blocks per query block, at least 2 where there are as many.
    """

    scorer: BlockScorer
    top_k: int = 16

    def __post_init__(self) -> None:
        if self.top_k < 2:
            raise ValueError(f"top_k={self.top_k} must be at least 2: the first and the query's own block stay always")

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Blocks | None:
        """See ``Selector``."""
        scores = self.scorer(layer, query, key)
        if scores is None:
            return None
        return top_blocks(scores, self.top_k, self.scorer.block_size, key.shape[2])


@dataclass
class ThresholdBlocks:
    """Selects all blocks that a scorer scores at least ``threshold``, and the first and the query's own."""

    scorer: BlockScorer
    threshold: float = 0.1

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Blocks | None:
        """See ``Selector``."""
        scores = self.scorer(layer, query, key)
        if scores is None:
            return None
        return blocks_of(_with_first(scores >= self.threshold), self.scorer.block_size, key.shape[2])


def top_blocks(scores: Tensor, top_k: int, block_size: int, keys: int) -> Blocks:
    """The ``top_k`` best visible blocks of every row of ``scores`` (B, G, Nq, Nk), own and first among them.

    Scores of -inf or NaN are not chosen, though fewer than ``top_k`` be left. Whatever a scorer says, the own block
    comes before the first and the first before the rest.
    """
    rows, count = scores.shape[2:]
    own = torch.arange(count - rows, count, device=scores.device)[:, None]
    columns = torch.arange(count, device=scores.device)
    largest = torch.finfo(torch.float32).max
    ranked = scores.float().nan_to_num(nan=-torch.inf, neginf=-torch.inf).clamp(max=largest / 2)
    ranked = ranked.masked_fill(columns > own, -torch.inf)
    ranked = ranked.masked_fill(columns == 0, largest).masked_fill(columns == own, torch.inf)
    best = ranked.topk(min(top_k, count), dim=-1)
    indices = best.indices.where(best.values > -torch.inf, count).sort(-1).values
    return Blocks(indices.where(indices < count, NOTHING), block_size, keys)


def _with_first(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[..., 0] = True
    return mask
