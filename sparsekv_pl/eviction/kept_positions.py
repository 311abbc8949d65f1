"""Find which context positions a cache still holds after any press, from the cache itself.

Presses do not report what they kept, and not all keep what their scores rank highest (AdaKV, ChunkKV, PyramidKV). But
the pairs of an evicted cache are rows of the full cache, bit for bit, so they are looked up there.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from kvpress import KeyRerotationPress
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.seeding import generator_for

Masked = Sequence[Tensor]
"""Three (M,) int64: rows, KV heads and keys that a head-wise press hides (kvpress's ``masked_key_indices``)."""


class _Pairs(NamedTuple):
    keys: Tensor
    """(B, K, pairs, D)."""
    values: Tensor


def masked_keys(model: PreTrainedModel) -> list[Masked | None]:
    """Collect, per layer, the pairs that a head-wise press (AdaKVPress) hides in ``model``; None if there are none."""
    layers = decoder_of(model).layers
    return [getattr(getattr(layer, "self_attn", None), "masked_key_indices", None) for layer in layers]


def kept_positions(
    full: DynamicCache,
    evicted: DynamicCache,
    masked: Sequence[Masked | None] | None = None,
    rotary: nn.Module | None = None,
    layers: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return per layer (B, K, L) bool, True where ``evicted`` holds the pair of that context position.

    ``full`` is the cache of the same context (B, L) before the eviction, from the same prefill
    (``RecordedPrefill.cache``); compare before either is continued. Pairs are matched by their keys and values. Equal
    pairs are interchangeable: the earliest positions count as kept.

    Some presses change what they keep. Channels of a head's keys that are zero throughout (ThinKPress) are left out of
    the comparison. If only values were changed (MergingPress blends evicted ones in), pairs are matched by keys alone.
    If keys were rotated to new positions, candidates are found by their values; in the first layer equal tokens have
    equal values, so each candidate's key is rotated as the press would do and must match bit for bit. Candidates that
    rounding makes equal are interchangeable too.

    Parameters
    ----------
    full, evicted
        Caches with the same number of layers.
    masked
        Pairs that are in the cache but hidden, per layer: ``masked_keys(model)``. None if none are.
    rotary
        The model's rotary embedding (``rotary_of(model)``), needed for presses that re-rotate keys.
    layers
        The layers to compare, in this order; None for all.

    Raises
    ------
    ValueError
        If a key of ``evicted`` is not in ``full``, or the caches differ in layers or in length.
    """
    masked = masked if masked is not None else [None] * len(full.layers)
    if not len(full.layers) == len(evicted.layers) == len(masked):
        raise ValueError(
            f"caches of {len(full.layers)} and {len(evicted.layers)} layers and masks of {len(masked)} cannot be "
            "compared: give the same model's"
        )
    kept = []
    for layer in range(len(masked)) if layers is None else layers:
        before, after, hidden = full.layers[layer], evicted.layers[layer], masked[layer]
        assert before.keys is not None and before.values is not None
        assert after.keys is not None and after.values is not None
        index = _positions(_Pairs(before.keys, before.values), _Pairs(after.keys, after.values), rotary, layer)
        held = torch.ones_like(index, dtype=torch.bool)
        if hidden is not None:
            held[tuple(hidden)] = False
        nothing = torch.zeros(before.keys.shape[:3], dtype=torch.bool, device=index.device)
        kept.append(nothing.scatter(-1, index, held))
    return kept


def _positions(there: _Pairs, here: _Pairs, rotary: nn.Module | None, layer: int) -> Tensor:
    """Find the context position of every pair of ``here`` among those of ``there``, (B, K, kept) int64."""
    if here.keys.shape[2] > there.keys.shape[2]:
        raise ValueError(
            f"layer {layer} holds {here.keys.shape[2]} pairs of a context of {there.keys.shape[2]}: compare before the "
            "cache is continued"
        )
    pruned = (here.keys == 0).all(2, keepdim=True)
    keys, keys_here = there.keys.masked_fill(pruned, 0), here.keys.masked_fill(pruned, 0)
    index = _find(torch.cat([keys, there.values], -1), torch.cat([keys_here, here.values], -1))
    if index is None:
        index = _find(keys, keys_here)
    if index is None and rotary is not None:
        index = _find_rotated(there, here, rotary)
    if index is None:
        rotated = ", or rotated to new positions: give the model's rotary embedding" if rotary is None else ""
        raise ValueError(
            f"the positions that layer {layer} holds are unknown: it has keys that the full cache has not. They were "
            f"merged, quantised or computed after an earlier eviction (a prefill in chunks){rotated}"
        )
    return index


def _find(there: Tensor, here: Tensor) -> Tensor | None:
    """Find for every row of ``here`` (B, K, n, D) an equal row of ``there`` (B, K, L, D), using each row once.

    Returns the indices (B, K, n), or None if there is no such assignment.
    """
    marks_there, order_there = _fingerprint(there).sort(dim=-1, stable=True)
    marks_here, order_here = _fingerprint(here).sort(dim=-1, stable=True)
    slots = torch.arange(here.shape[2], device=here.device)
    copy = slots - torch.searchsorted(marks_here, marks_here)  # 0 for the first of equal rows, 1 for the second
    slot = torch.searchsorted(marks_there, marks_here) + copy
    index = order_there.gather(-1, slot.clamp(max=there.shape[2] - 1))
    index = torch.empty_like(index).scatter(-1, order_here, index)
    equal = _bits(_rows(there, index)) == _bits(here)
    distinct = index.sort(dim=-1).values.diff(dim=-1) > 0
    return index if bool(equal.all()) and bool(distinct.all()) else None


def _find_rotated(there: _Pairs, here: _Pairs, rotary: nn.Module) -> Tensor | None:
    """Find rows as ``_find`` does, for keys rotated from their positions to 0..n-1 and still in order."""
    length = there.keys.shape[2]
    marks_there, order_there = _fingerprint(there.values).sort(dim=-1, stable=True)
    marks_here = _fingerprint(here.values)
    first = torch.searchsorted(marks_there, marks_here)
    copies = torch.searchsorted(marks_there, marks_here, right=True) - first
    press_sees = SimpleNamespace(rotary_emb=rotary, head_dim=there.keys.shape[-1])
    candidates = []  # (B, K, n) each, ``length`` where there is none
    for copy in range(int(copies.max())):
        index = order_there.gather(-1, (first + copy).clamp(max=length - 1))
        rotated = KeyRerotationPress.rerotate_keys(press_sees, index, there.keys)
        fits = (rotated == here.keys).all(-1) & (copy < copies)
        candidates.append(index.masked_fill(~fits, length))
    if not candidates:
        return None
    found = [torch.full_like(first[..., 0], -1)]
    for options in torch.stack(candidates).unbind(-1):
        found.append(options.masked_fill(options <= found[-1], length).amin(0))
    return None if bool((found[-1] == length).any()) else torch.stack(found[1:], -1)


def _fingerprint(rows: Tensor) -> Tensor:
    """Hash rows (B, K, n, D) to (B, K, n) int64: equal for equal bits, different otherwise with high probability."""
    generator = generator_for("fingerprint")
    # Odd factors are invertible modulo 2**64: a change in one number is never lost.
    factors = torch.randint(-(2**63), 2**63 - 1, (rows.shape[-1],), generator=generator) | 1
    return (_bits(rows).long() * factors.to(rows.device)).sum(-1)


def _bits(rows: Tensor) -> Tensor:
    """View the memory of ``rows`` as integers, so that -0.0, NaN and rounding do not matter."""
    return rows.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])


def _rows(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1]))
