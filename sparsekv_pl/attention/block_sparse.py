"""Block-sparse attention: compute only the selected key blocks.

Each query block's keys and values are gathered and multiplied as dense matrices, so a block that is not selected costs
nothing. All queries of a block share the gathered keys and values, and so do the query heads of a KV head if all heads
have the same selection. Only a query block's own block needs the causal mask: it is gathered first, as one slice.
"""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from sparsekv_pl.attention.blocks import NOTHING, Blocks, block_count, check_shapes, first_block
from sparsekv_pl.attention.flex_blocks import flex_attention_over, suits_flex

UNIT = 3 << 20
"""Bytes that a CPU thread gathers and scores at once, so that they fit its caches."""
UNIT_ON_DEVICE = 64 << 20
"""The same on other devices, whose many multiprocessors need more work at once."""


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float | None = None
) -> Tensor:
    """Attend causally to the selected blocks; return (B, H, T, D). Equal to ``dense_reference``.

    Beyond inputs, output and gradients, memory does not grow with T, and a single query reads only its selected blocks.
    Differentiable once: backward computes every unit of work again. In 16 bits the dot products are rounded to 16 bits
    before the softmax, as in eager attention. Under autocast the inputs are cast as for PyTorch's attention.
    FlexAttention computes it if ``suits_flex``; everything else takes the same path on every device. Raises
    ``ValueError`` if shapes do not fit one another, or ``blocks`` was selected for other queries and keys.

    Parameters
    ----------
    query, key, value
        ``query`` (B, H, T, D) has the last T of the S positions of ``key`` and ``value`` (B, K, S, D); any dtype, H a
        multiple of K.
    blocks
        The selected key blocks of each query block.
    scaling
        Factor of the dot products; None for 1 / sqrt(D).
    """
    _check(query, key, value, blocks)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    scaled = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(kind, enabled=False):
        if suits_flex(query, key, value, blocks):
            return flex_attention_over(blocks, query, key, value, scaled)
        return _gathered_attention(query, key, value, blocks, scaled)


def dense_reference(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float | None = None) -> Tensor:
    """Compute ``block_sparse_attention`` with a mask over all T x S pairs: the slow reference.

    Returns (B, H, T, D); ``query`` (B, H, T, D) has the last T of the S positions of ``key`` and ``value``
    (B, K, S, D).
    """
    queries, keys, size = query.shape[2], key.shape[2], blocks.block_size
    positions = torch.arange(keys - queries, keys, device=query.device)
    columns = torch.arange(keys, device=query.device)
    chosen = blocks.mask()[:, :, positions // size - blocks.first][..., columns // size]
    mask = chosen & (columns <= positions[:, None])
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


def _check(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> None:
    check_shapes(query, key)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit: give twice (B, K, S, D)")
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    count = block_count(keys, blocks.block_size)
    expected = batch, count - first_block(queries, keys, blocks.block_size)
    groups = blocks.indices.shape[1]
    if blocks.keys != keys or (len(blocks.indices), blocks.indices.shape[2]) != expected or groups not in (1, heads):
        raise ValueError(
            f"blocks {tuple(blocks.indices.shape)} of {blocks.block_size} over {blocks.keys} keys do not fit queries "
            f"{tuple(query.shape)} over {keys} keys: select them from the same queries and keys, for 1 or all heads"
        )


def _gathered_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float) -> Tensor:
    """Attend by gathering, (B, H, T, D). Queries are padded to whole blocks, unless all are in one block."""
    batch, heads, queries, _ = query.shape
    size, (_, groups, rows, _) = blocks.block_size, blocks.indices.shape
    offset, before, after = (key.shape[2] - queries) % size, 0, 0
    if rows > 1:
        offset, before, after = 0, offset, -key.shape[2] % size
    folded = key.shape[1] if groups == 1 else heads
    aligned = pad(query, (0, 0, before, after)) if before or after else query
    grouped = aligned.unflatten(2, (rows, -1)).unflatten(1, (folded, -1))
    attended: Tensor = _Gathered.apply(grouped, key, value, blocks, offset, scaling)
    return attended.view(batch, heads, -1, value.shape[-1])[:, :, before : before + queries]


class _Unit(NamedTuple):
    """A unit of work: N query blocks of one row, for the heads that share a KV head and a selection."""

    query_at: tuple[int, int, slice, slice]
    key_at: tuple[int, int]
    indices: Tensor
    """(N, k) int64, descending: the own block first, ``NOTHING`` last."""
    tokens: Tensor
    """(N * k * size,) int64, positions of the blocks' keys; for ``NOTHING``, of keys that are masked."""
    absent: Tensor | None
    """(N, 1, k, 1) bool, True for ``NOTHING``; None if there is none."""

    def gather(self, states: Tensor, scratch: "_Scratch | None" = None) -> Tensor:
        """Gather (N, k * size, D) from ``states`` (B, K, S, D)."""
        shape = len(self.tokens), states.shape[-1]
        out = None if scratch is None else scratch.take("gathered", states, *shape)
        gathered = torch.index_select(states[self.key_at], 0, self.tokens, out=out)
        return gathered.view(len(self.indices), -1, shape[1])


class _Scratch:
    """Memory reused by one unit after the other: allocating pages takes CPUs as long as the matrix products."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor like ``like``, in the memory of the last tensor of this name."""
        if name not in self.kept or self.kept[name].numel() < prod(shape):
            self.kept[name] = like.new_empty(prod(shape))
        return self.kept[name][: prod(shape)].view(shape)


class _Work:
    """The division of attention of ``query`` (B, G, heads, Nq, R, D) into units. G is K, or H if each head selects.

    The first of the R queries of a block is at the block's position ``offset``.
    """

    def __init__(self, query: Tensor, key: Tensor, blocks: Blocks, offset: int, scaling: float) -> None:
        self.scaling, self.size, self.keys = scaling, blocks.block_size, blocks.keys
        self.batch, self.groups, self.heads, self.query_blocks, self.rows, dim = query.shape
        self.heads_per_key = self.groups // key.shape[1]
        self.indices = blocks.indices.sort(-1, descending=True).values
        own = torch.arange(blocks.first, blocks.first + self.query_blocks, device=query.device)
        assert bool((self.indices[..., 0] == own).all()), "a query block's last block is its own"
        self.within = torch.arange(self.size, device=query.device)
        self.later = self.within > torch.arange(offset, offset + self.rows, device=query.device)[:, None]
        self.bytes_per_key = (self.heads * self.rows + 2 * dim) * query.element_size()
        self.at_once, self.limit = 1, UNIT_ON_DEVICE
        if query.device.type == "cpu":
            self.at_once, self.limit = torch.get_num_threads(), UNIT

    def units(self) -> Iterator[_Unit]:
        """Yield all units of work."""
        selected = (self.indices != NOTHING).sum(-1).tolist()
        for row, group in product(range(self.batch), range(self.groups)):
            shared = group % self.indices.shape[1]
            indices, counts = self.indices[row, shared], selected[row][shared]
            step = self.at_once * max(1, self.limit // (max(counts) * self.size * self.bytes_per_key))
            for start in range(0, self.query_blocks, step):
                some = slice(start, start + step)
                most, least = max(counts[some]), min(counts[some])
                chosen = indices[some, :most]
                tokens = (chosen[..., None] * self.size + self.within).clamp_(0, self.keys - 1).flatten()
                absent = None if least == most else (chosen == NOTHING)[:, None, :, None]
                at = row, group, slice(None), some
                yield _Unit(at, (row, group // self.heads_per_key), chosen, tokens, absent)

    def zeros(self, states: Tensor) -> Tensor:
        """Return zeros (B, K, blocks, size * D) for gradients of ``states`` (B, K, S, D), float32 or wider."""
        count, dtype = block_count(self.keys, self.size), torch.promote_types(states.dtype, torch.float32)
        return states.new_zeros(*states.shape[:2], count, self.size * states.shape[-1], dtype=dtype)

    def weights(self, query: Tensor, key: Tensor, absent: Tensor | None, scratch: _Scratch | None = None) -> Tensor:
        """Compute attention weights (N, heads * R, k * size) of a unit.

        ``query`` (N, heads, R, D) are its queries, ``key`` (N, k * size, D) its gathered keys.
        """
        folded = query.flatten(1, 2)
        out = None if scratch is None else scratch.take("scores", query, *folded.shape[:2], key.shape[1])
        scores = torch.baddbmm(query.new_empty(()), folded, key.mT, beta=0, alpha=self.scaling, out=out)
        own = scores.unflatten(1, query.shape[1:3])[..., : self.size]
        own.masked_fill_(self.later, -torch.inf)
        if absent is not None:
            scores.unflatten(2, (-1, self.size)).masked_fill_(absent, -torch.inf)
        return scores.softmax(-1) if scratch is None else torch.softmax(scores, -1, out=scores)


class _Gathered(torch.autograd.Function):
    """Attention of queries (B, G, heads, Nq, R, D) over keys and values (B, K, S, D); the result has that shape."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, offset: int, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.work = work = _Work(query, key, blocks, offset, scaling)
        attended, scratch = query.new_empty(*query.shape[:-1], value.shape[-1]), _Scratch()
        for unit in work.units():
            queries = query[unit.query_at].transpose(0, 1)
            # Values are gathered after the weights, into the keys' memory, which is still in the CPU's cache.
            weights = work.weights(queries, unit.gather(key, scratch), unit.absent, scratch)
            product = weights @ unit.gather(value, scratch)
            attended[unit.query_at] = product.unflatten(1, queries.shape[1:3]).transpose(0, 1)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Add up gradients block by block, in at least float32: keys and values are in many units."""
        query, key, value = ctx.saved_tensors
        work: _Work = ctx.work
        of_query = torch.empty_like(query)
        of_key, of_value = work.zeros(key), work.zeros(value)
        for unit in work.units():
            inputs = query[unit.query_at].transpose(0, 1), unit.gather(key), unit.gather(value)
            queries, keys, values = (states.detach().requires_grad_() for states in inputs)
            with torch.enable_grad():
                attended = work.weights(queries, keys, unit.absent) @ values
            upper = gradient[unit.query_at].transpose(0, 1).flatten(1, 2)
            parts = torch.autograd.grad(attended, (queries, keys, values), upper)
            of_query[unit.query_at] = parts[0].transpose(0, 1)
            for total, part in zip((of_key, of_value), parts[1:], strict=True):
                by_block = part.to(total.dtype).reshape(unit.indices.numel(), -1)
                total[unit.key_at].index_add_(0, unit.indices.flatten().clamp(min=0), by_block)
        by_token = (
            total.view(*states.shape[:2], -1, states.shape[-1])[:, :, : work.keys].to(states.dtype)
            for total, states in ((of_key, key), (of_value, value))
        )
        return of_query, *by_token, None, None, None
