"""Tensors between devices: what layers on several of them made, and what was drawn on the host."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(layers: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One tensor of a tensor per layer, on the first one's device: layers may lie on several (``Placement``)."""
    return torch.stack([layer.to(layers[0].device) for layer in layers], dim)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``. Out of the host's memory a GPU fetches them in its own time: nothing waits for it."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
