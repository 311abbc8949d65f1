"""Move tensors between devices: from layers on several devices, and from the host."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(layers: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Stack one tensor per layer on the first one's device; layers may be on several devices (``Placement``)."""
    return torch.stack([layer.to(layers[0].device) for layer in layers], dim)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` to ``device``; from the host to a GPU through pinned memory, without waiting."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
