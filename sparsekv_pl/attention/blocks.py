"""The key blocks that query blocks attend to, and their selection from scores.

Blocks start at position 0, for queries and keys; the last one may be shorter. With T new queries over S keys, the query
blocks are those that contain the last T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NOTHING = -1
"""Filler index where a query block has fewer key blocks than others."""


def check_shapes(query: Tensor, key: Tensor) -> None:
    """Raise ``ValueError`` unless queries (B, H, T, D) are the last T of the S positions of keys (B, K, S, D)."""
    (batch, heads, queries, dim), (rows, kv_heads, keys, key_dim) = query.shape, key.shape
    if batch != rows or dim != key_dim or heads % kv_heads or not 0 < queries <= keys:
        raise ValueError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not fit: give (B, H, T, D) and (B, K, S, D) "
            "with H a multiple of K and the queries the last T of the S positions"
        )


def check_seen(layer: int, given: tuple[int, int], scored: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless the (rows, older keys) of a forward are the (rows, tokens) that a scorer has seen."""
    if given != scored:
        raise ValueError(
            f"layer {layer} has {given[1]} older keys in {given[0]} rows, but {scored[1]} tokens in {scored[0]} rows "
            "were scored: blocks need the whole cache. Evict nothing (no press), give every forward of a context to "
            "the same scorer, and copy the scorer where a cache is copied"
        )


def block_count(tokens: int, block_size: int) -> int:
    """Return the number of blocks that ``tokens`` tokens take."""
    return -(-tokens // block_size)


def first_block(queries: int, keys: int, block_size: int) -> int:
    """Return the block of the first query, if the queries are the last ``queries`` of ``keys`` positions."""
    return (keys - queries) // block_size


def visible_blocks(queries: int, keys: int, block_size: int, device: torch.device | None = None) -> Tensor:
    """Return (Nq, Nk) bool, True for key blocks at or before each query block."""
    first, count = first_block(queries, keys, block_size), block_count(keys, block_size)
    rows = torch.arange(first, count, device=device)
    return torch.arange(count, device=device) <= rows[:, None]


@dataclass(frozen=True)
class Blocks:
    """The selected key blocks of every query block.

    A query block's own block is always selected, so that every query sees itself; later blocks never are.
    """

    indices: Tensor
    """(B, G, Nq, k) int64, ascending, ``NOTHING`` at the end. G is 1 (all heads share) or the number of query heads."""
    block_size: int
    """Tokens per block."""
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
        """(B, G) float, the share of visible blocks that is not selected."""
        rows = torch.arange(self.first, self.first + self.indices.shape[2], device=self.indices.device) + 1
        return 1 - (self.indices != NOTHING).sum((2, 3)) / rows.sum()


def blocks_of(mask: Tensor, block_size: int, keys: int) -> Blocks:
    """Make ``Blocks`` of ``mask`` (B, G, Nq, Nk) bool; own blocks are added and later ones removed."""
    count = mask.shape[-1]
    rows = torch.arange(count - mask.shape[2], count, device=mask.device)
    columns = torch.arange(count, device=mask.device)
    selected = mask & (columns <= rows[:, None]) | (columns == rows[:, None])
    width = int(selected.sum(-1).max())
    indices = torch.where(selected, columns, count).sort(-1).values[..., :width]
    return Blocks(indices.where(indices < count, NOTHING), block_size, keys)


class BlockScorer(Protocol):
    """A scorer of key blocks for each query block; it may keep state between layers and steps.

    A new context (as many queries as keys) resets the state. Raises ``ValueError`` for keys after an eviction, which
    have no blocks.
    """

    block_size: int
    """Tokens per block."""

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """Return scores (B, G, Nq, Nk) float32, higher is selected first; None for dense attention.

        ``query`` (B, H, T, D) has the last T of the S positions of ``key`` (B, K, S, D), both after RoPE. Scores of
        later blocks are ignored.
        """


Selector = Callable[[int, Tensor, Tensor], Blocks | None]
"""Takes layer_idx, queries and keys as a ``BlockScorer`` does; returns selected blocks, or None for dense attention."""


@dataclass
class TopBlocks:
    """Select the ``top_k_blocks`` (at least 2) best blocks by a scorer, always with the first and the query's own."""

    scorer: BlockScorer
    top_k_blocks: int = 16

    def __post_init__(self) -> None:
        if self.top_k_blocks < 2:
            raise ValueError(
                f"top_k_blocks={self.top_k_blocks} must be at least 2: the first and the query's own block always stay"
            )

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Blocks | None:
        scores = self.scorer(layer, query, key)
        if scores is None:
            return None
        return top_blocks(scores, self.top_k_blocks, self.scorer.block_size, key.shape[2])


def top_blocks(scores: Tensor, top_k: int, block_size: int, keys: int) -> Blocks:
    """Select the ``top_k`` best visible blocks of every query block by ``scores`` (B, G, Nq, Nk).

    Blocks with a score of -inf or NaN are not selected, even if fewer than ``top_k`` are left. The own block comes
    first and block 0 second, whatever their scores.
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


def threshold_blocks(scores: Tensor, threshold: float, block_size: int, keys: int) -> Blocks:
    """Select the blocks with a score (B, G, Nq, Nk) of at least ``threshold``, the first block and the own one."""
    first = torch.arange(scores.shape[-1], device=scores.device) == 0
    return blocks_of((scores >= threshold) | first, block_size, keys)
