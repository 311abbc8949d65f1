"""Numbers stored as codes of 8, 4 or 2 bits, with a step and a minimum for every group of neighbours.

Asymmetric rounding to nearest, as in KIVI (https://arxiv.org/abs/2402.02750): a group's smallest number has code 0 and
its largest the last code. Steps and minima are float16, whatever the numbers' dtype, and codes are counted from the
rounded ones, so that what is read is what was rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedCodes:
    """A tensor (B, K, S, D) in few bits."""

    codes: Tensor
    """(B, K, S, D * bits / 8) uint8: neighbours in D share a byte, the first in its lowest bits."""
    steps: Tensor
    """float16, the distance of two codes: (B, K, groups, D) for groups of pairs, (B, K, S, groups) for channels."""
    least: Tensor
    """float16, the number with code 0; shaped like ``steps``."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes, steps and minima."""
        return self.codes.nbytes + self.steps.nbytes + self.least.nbytes

    def unpacked(self, bits: int, group: int, along: int, dtype: torch.dtype) -> Tensor:
        """Return the numbers (B, K, S, D) that were packed with these settings."""
        codes = _spread(self.codes, bits)
        steps, least = (_each(part, group, along, codes.shape[along]) for part in (self.steps, self.least))
        return torch.addcmul(least, codes.to(least.dtype), steps).to(dtype)


def packed(numbers: Tensor, bits: int, group: int, along: int) -> PackedCodes:
    """Round numbers (B, K, S, D) in groups of ``group`` along dimension ``along`` (2: pairs, 3: channels).

    The last group may be shorter. Raises ``ValueError`` if D numbers of ``bits`` bits fill no whole bytes.
    """
    if numbers.shape[-1] * bits % 8:
        raise ValueError(f"bits={bits}: heads of {numbers.shape[-1]} numbers fill no whole bytes: take more bits")
    exact = numbers.detach().float()
    if not exact.shape[along]:
        return PackedCodes(_joined(exact.to(torch.uint8), bits), exact.half(), exact.half())
    parts = exact.split(group, dim=along)
    low = torch.cat([part.amin(along, keepdim=True) for part in parts], dim=along)
    high = torch.cat([part.amax(along, keepdim=True) for part in parts], dim=along)
    last = 2**bits - 1
    steps, least = ((high - low) / last).to(torch.float16), low.to(torch.float16)
    step, start = (_each(part, group, along, exact.shape[along]) for part in (steps, least))
    codes = ((exact - start) / step.where(step > 0, 1.0)).round().clamp(0, last)
    return PackedCodes(_joined(codes.to(torch.uint8), bits), steps, least)


def packed_bytes(shape: torch.Size, bits: int, group: int, along: int) -> int:
    """Return the ``nbytes`` of a packed tensor of this shape (B, K, S, D)."""
    numbers, length = shape.numel(), shape[along]
    groups = numbers // length * -(-length // group) if length else 0
    return numbers * bits // 8 + 4 * groups


def _each(part: Tensor, group: int, along: int, length: int) -> Tensor:
    """Repeat each group's number for its members, in float32."""
    return part.float().repeat_interleave(group, dim=along).narrow(along, 0, length)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Put neighbouring codes (..., D) uint8 into shared bytes."""
    places = codes.unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (places << shifts).sum(-1, dtype=torch.uint8)


def _spread(joined: Tensor, bits: int) -> Tensor:
    """Undo ``_joined``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=joined.device)
    return ((joined.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
