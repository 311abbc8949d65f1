"""The slow reference of quantised pairs: one number at a time."""

import torch
from torch import Tensor


def half(number: float) -> float:
    """Return ``number`` as float16 holds it."""
    return float(torch.tensor(number, dtype=torch.float32).half())


def rounded_group(numbers: list[float], bits: int) -> list[float]:
    """Round one group's numbers to codes between its smallest and its largest."""
    least, last = half(min(numbers)), 2**bits - 1
    step = half((torch.tensor(max(numbers)) - torch.tensor(min(numbers))).item() / last)
    codes = [0 if step == 0 else min(max(round((number - least) / step), 0), last) for number in numbers]
    return [least + code * step for code in codes]


def slowly_rounded(
    keys: Tensor, values: Tensor, bits: int, group: int = 64, residual: int = 0
) -> tuple[Tensor, Tensor]:
    """Return keys and values (B, K, S, D) rounded: keys by channel in groups of pairs, values by pair."""
    keys, values = keys.detach().clone(), values.detach().clone()
    rows, heads, pairs, channels = keys.shape
    whole = max(0, pairs - residual)
    for row in range(rows):
        for head in range(heads):
            for start in range(0, whole, group):
                stop = min(start + group, whole)
                for channel in range(channels):
                    own = keys[row, head, start:stop, channel]
                    own.copy_(torch.tensor(rounded_group(own.tolist(), bits)))
            for pair in range(whole):
                for start in range(0, channels, group):
                    own = values[row, head, pair, start : start + group]
                    own.copy_(torch.tensor(rounded_group(own.tolist(), bits)))
    return keys, values
