"""Measures of agreement between two selections of key blocks, and between a selection and the true attention.

A row is one query block of one head, with a bool or a number per key block. Shapes are (..., N), N key blocks, and
broadcast: a selection shared by all heads has a head dimension of 1. Rows where a measure is undefined (nothing
selected, all numbers equal) are NaN and are left out of means (``torch.nanmean``).

Every method selects the first block and a query's own block. ``among`` selects the blocks that are counted, so that
these two can be left out.
"""

import torch
from torch import Tensor


def free_blocks(visible: Tensor) -> Tensor:
    """(Nq, N) bool: the blocks that a method is free to select, which are the visible ones but the first and the own.

    ``visible`` (Nq, N) comes from ``attention.blocks.visible_blocks``; a row's own block is the last visible one.
    """
    columns = torch.arange(visible.shape[-1], device=visible.device)
    return visible & (columns > 0) & (columns < visible.sum(-1, keepdim=True) - 1)


def overlap(selected: Tensor, other: Tensor, among: Tensor) -> Tensor:
    """(...): the share of the ``selected`` blocks that ``other`` also selects; NaN if nothing is selected.

    It is symmetric for selections of equal size. ``overlap(truth, selected)`` is the recall of the true blocks.
    """
    selected = selected & among
    return (selected & other).sum(-1) / selected.sum(-1)


def jaccard(selected: Tensor, other: Tensor, among: Tensor) -> Tensor:
    """(...): number of blocks in the intersection divided by the number in the union; NaN if both are empty.

    >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    >>> round(float(jaccard(a, b, torch.ones(3, dtype=torch.bool))), 4)
    0.3333
    """
    return (selected & other & among).sum(-1) / ((selected | other) & among).sum(-1)


def mass_kept(selected: Tensor, mass: Tensor) -> Tensor:
    """(...): the share of a row's attention ``mass`` (..., N) on the ``selected`` blocks."""
    return (mass * selected).sum(-1) / mass.sum(-1)


def pearson(scores: Tensor, truth: Tensor, among: Tensor) -> Tensor:
    """(...): correlation of ``scores`` with ``truth`` over the blocks in ``among``; NaN if either is constant."""
    among = among.expand(torch.broadcast_shapes(scores.shape, truth.shape, among.shape))
    a, b = (_centred(values, among) for values in (scores, truth))
    norms = a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt()
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan).clamp(-1, 1)


def spearman(scores: Tensor, truth: Tensor, among: Tensor) -> Tensor:
    """(...): correlation of the ranks within ``among``; equal numbers get the mean of their ranks."""
    return pearson(_ranks(scores, among), _ranks(truth, among), among)


def blocks_for_mass(scores: Tensor, mass: Tensor, share: float, visible: Tensor) -> Tensor:
    """(...) int64: the number of blocks, in order of score, that a row needs to keep ``share`` of its mass.

    The first block and the row's own come before all others, as in every selection here. Raises ``ValueError`` for a
    share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be in (0, 1]: it is a share of the attention mass")
    forced = visible & ~free_blocks(visible)
    ranked = scores.double().masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    shape = torch.broadcast_shapes(order.shape, mass.shape)
    kept = mass.double().masked_fill(~visible, 0).expand(shape).gather(-1, order.expand(shape)).cumsum(-1)
    # The tolerance is for rounding: sums in another order differ in their last bits.
    needed = (kept < kept[..., -1:] * (share - 1e-9)).sum(-1) + 1
    return torch.minimum(needed, visible.sum(-1))


def sparsity(blocks: Tensor, visible: Tensor) -> Tensor:
    """(...): the share of all rows' visible blocks that is left out, if each row takes ``blocks`` (..., Nq)."""
    return 1 - blocks.sum(-1) / visible.sum()


def _centred(values: Tensor, among: Tensor) -> Tensor:
    """``values`` in float64 with mean 0 over ``among`` and 0 elsewhere; a constant becomes exactly 0."""
    values = values.double().expand(among.shape).masked_fill(~among, 0)
    mean = values.sum(-1, keepdim=True) / among.sum(-1, keepdim=True)
    low = values.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~among, -torch.inf).amax(-1, keepdim=True)
    return (values - mean).masked_fill(~among | (low == high), 0)


def _ranks(values: Tensor, among: Tensor) -> Tensor:
    """Ranks of ``values`` from 1 within ``among``, float64."""
    shape = torch.broadcast_shapes(values.shape, among.shape)
    values = values.double().expand(shape).masked_fill(~among, torch.inf)  # last, after all ranks that are used
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above + 1).double() / 2
