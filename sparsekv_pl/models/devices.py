"""Where layers compute, and tensors that move between devices."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def stacked(layers: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Stack one tensor per layer on the first one's device; layers may be on several devices (``Placement``)."""
    return torch.stack([layer.to(layers[0].device) for layer in layers], dim)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` to ``device``; from the host to a GPU through pinned memory, without waiting."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def layer_device(layer: nn.Module) -> torch.device:
    """Return the device where a layer computes: accelerate's hook has it if the weights are elsewhere (offload)."""
    hook = getattr(layer, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or next(layer.parameters()).device)
