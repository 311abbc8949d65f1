"""Attention of one KV head's query group in tiles: strips of queries against tiles of keys, never L x L.

The first pass over a strip's tiles keeps a running log-sum-exp of every query (Milakov and Gimelshein, "Online
normalizer calculation for softmax", arXiv 1805.02867); the second yields each tile with the factor that makes its
weights probabilities. If one tile holds all keys, it is computed once; tiles that no query of a strip can see are
skipped.

Logits and exponentials are to the base 2: on CPUs PyTorch's exp2 takes a third of the time of its exp, and a twentieth
if results are near 0, as most attention weights are.
"""

from collections.abc import Iterator
from math import e, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekv_pl.models.softmax_rule import PLAIN, SoftmaxRule

HIDDEN = -1e30
"""The logit of a key that a query cannot see; finite, so that 0 * log 0 is 0 and not NaN."""

BITS_PER_NAT = log2(e)


class Tile(NamedTuple):
    """The queries (G, Q) of a strip against the keys from ``start`` to ``stop``."""

    start: int
    stop: int
    logits: Tensor
    """(G, Q, keys), minus ``peak``."""
    weights: Tensor
    """(G, Q, keys), 2 ** ``logits``."""
    peak: Tensor
    """(G, Q), the largest logit."""
    block_mass: Tensor
    """(G, Q, blocks), weights summed by block."""


class Strip:
    """Consecutive queries (G, Q, D) of a group of G heads, the first at ``position``, over one KV head's keys (S, D).

    ``scaling`` and ``rule``, whose sinks are the group's (G,), are for base e.
    """

    def __init__(self, query: Tensor, keys: Tensor, position: int, scaling: float, rule: SoftmaxRule = PLAIN) -> None:
        self.rule = SoftmaxRule(
            None if rule.cap is None else rule.cap * BITS_PER_NAT,
            None if rule.sinks is None else rule.sinks.float() * BITS_PER_NAT,
        )
        self.query = query.float() * (scaling * BITS_PER_NAT)
        self.keys, self.position = keys, position
        self.seen = position + query.shape[1]
        self.positions = torch.arange(position, self.seen, device=query.device)

    def tile(self, start: int, stop: int, block_size: int) -> Tile:
        """Compute the tile of keys start..stop. Hidden keys weigh 0; if a query sees none of them, all weigh 1."""
        flat = self.query.flatten(0, 1) @ self.keys[start:stop].T
        logits = self.rule.logits(flat.view(*self.query.shape[:2], -1))
        if stop > self.position:
            since = max(start, self.position)
            later = torch.arange(since, stop, device=flat.device) > self.positions[:, None]
            logits[..., since - start :].masked_fill_(later, HIDDEN)
        peak = logits.amax(-1)
        weights = logits.sub_(peak.unsqueeze(-1)).exp2()
        return Tile(start, stop, logits, weights, peak, block_sums(weights, block_size))

    def tiles(self, step: int, block_size: int) -> Iterator[tuple[Tile, Tensor]]:
        """Yield every tile that a query sees, and log2 of the factor (G, Q) that makes its weights probabilities."""
        bounds = [(start, min(start + step, self.seen)) for start in range(0, self.seen, step)]
        peak, mass = self.query.new_full(self.query.shape[:2], HIDDEN), self.query.new_zeros(self.query.shape[:2])
        if self.rule.sinks is not None:  # a key that every query sees first
            peak, mass = self.rule.sinks[:, None].expand_as(peak), torch.ones_like(mass)
        for start, stop in bounds:
            tile = self.tile(start, stop, block_size)
            higher = torch.maximum(peak, tile.peak)
            mass = mass * (peak - higher).exp2() + tile.block_mass.sum(-1) * (tile.peak - higher).exp2()
            peak = higher
        for start, stop in reversed(bounds):  # the last tile is reused
            if stop != tile.stop:
                tile = self.tile(start, stop, block_size)
            yield tile, tile.peak - peak - mass.log2()


def block_sums(values: Tensor, block_size: int) -> Tensor:
    """Sum values (..., S) over blocks of ``block_size``, the last of which may be shorter: (..., blocks)."""
    whole = values.shape[-1] // block_size * block_size
    sums = values[..., :whole].unflatten(-1, (-1, block_size)).sum(-1)
    return sums if whole == values.shape[-1] else torch.cat([sums, values[..., whole:].sum(-1, keepdim=True)], dim=-1)
