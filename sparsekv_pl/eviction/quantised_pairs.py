"""Kept pairs in few bits: which numbers share a scale, what stays whole, and how many bytes that takes."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.cache_layers import tensors_of
from sparsekv_pl.eviction.packed_codes import PackedCodes, packed, packed_bytes

BITS = (8, 4, 2)
PAIRS, CHANNELS = 2, 3
"""Dimensions of keys and values (B, K, S, D)."""


@dataclass(frozen=True)
class PairQuantisation:
    """How kept pairs are stored in few bits, as in KIVI (https://arxiv.org/abs/2402.02750).

    Keys are rounded channel by channel, in groups of neighbouring pairs; values pair by pair, in groups of neighbouring
    channels. Each group has a scale and a minimum in float16. Pairs that come after the eviction (a question, its
    answer) stay whole.

    Parameters
    ----------
    bits
        Bits of a number: 8, 4 or 2.
    group
        Numbers that share a scale and a minimum; the last group of a dimension may be shorter.
    residual
        The context's newest kept pairs that stay whole, per head.

    Raises
    ------
    ValueError
        For other bits, an empty group, or a negative residual.
    """

    bits: int
    group: int = 64
    residual: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be 8, 4 or 2; leave quantisation out for whole pairs")
        if self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1 number")
        if self.residual < 0:
            raise ValueError(f"residual={self.residual} must be at least 0 pairs")

    def __str__(self) -> str:
        group = f", groups of {self.group}" * (self.group != PairQuantisation.group)
        return f"{self.bits} bits{group}" + f", newest {self.residual} whole" * bool(self.residual)

    def quantised(self, pairs: int) -> int:
        """Return how many of a head's ``pairs`` are quantised."""
        return max(0, pairs - self.residual)


@dataclass(frozen=True)
class PackedPairs:
    """One layer's kept pairs in few bits; the newest may be whole."""

    settings: PairQuantisation
    keys: PackedCodes
    values: PackedCodes
    newest_keys: Tensor
    """(B, K, residual, D) in the model's dtype."""
    newest_values: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, settings: PairQuantisation) -> "PackedPairs":
        """Pack keys and values (B, K, S, D), in the order of positions."""
        cut = settings.quantised(keys.shape[PAIRS])
        bits, group = settings.bits, settings.group
        return cls(
            settings,
            packed(keys[:, :, :cut], bits, group, along=PAIRS),
            packed(values[:, :, :cut], bits, group, along=CHANNELS),
            keys[:, :, cut:].detach(),
            values[:, :, cut:].detach(),
        )

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, K, S, D) as attention reads them."""
        bits, group, dtype = self.settings.bits, self.settings.group, self.newest_keys.dtype
        keys = self.keys.unpacked(bits, group, PAIRS, dtype)
        values = self.values.unpacked(bits, group, CHANNELS, dtype)
        return torch.cat([keys, self.newest_keys], PAIRS), torch.cat([values, self.newest_values], PAIRS)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, minima and whole pairs."""
        return self.keys.nbytes + self.values.nbytes + self.newest_keys.nbytes + self.newest_values.nbytes


def quantise(
    cache: DynamicCache, settings: PairQuantisation, only: Collection[int] | None = None
) -> dict[int, PackedPairs]:
    """Replace every pair of ``cache``, or of ``only`` some layers, by its rounded numbers; return those layers packed.

    Gradients pass through the rounding unchanged (the straight-through estimator, https://arxiv.org/abs/1308.3432).
    """
    layers: dict[int, PackedPairs] = {}
    for index, layer in enumerate(cache.layers):
        if only is not None and index not in only:
            continue
        assert layer.keys is not None and layer.values is not None
        layers[index] = PackedPairs.of(layer.keys, layer.values, settings)
        rounded = layers[index].unpacked()
        layer.keys, layer.values = map(_straight_through, (layer.keys, layer.values), rounded)
    return layers


def quantised_bytes(cache: DynamicCache, settings: PairQuantisation, only: Collection[int] | None = None) -> int:
    """Return the bytes that the pairs of ``cache`` take packed: codes, scales, minima and whole pairs, all rows.

    Layers that are not among ``only`` are whole.
    """
    total = 0
    for index, layer in enumerate(cache.layers):
        for name, numbers in tensors_of(layer).items():
            whole = name not in ("keys", "values") or (only is not None and index not in only)
            along = PAIRS if name == "keys" else CHANNELS
            total += numbers.nbytes if whole else _bytes((numbers, along), settings)
    return total


def _bytes(part: tuple[Tensor, int], settings: PairQuantisation) -> int:
    numbers, along = part
    cut = settings.quantised(numbers.shape[PAIRS])
    rounded, whole = numbers[:, :, :cut].shape, numbers[:, :, cut:]
    return packed_bytes(rounded, settings.bits, settings.group, along) + whole.numel() * whole.element_size()


def _straight_through(numbers: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded``, exactly, with the gradient of ``numbers``."""
    return rounded + (numbers - numbers.detach()) if numbers.requires_grad else rounded
