"""Pack many small tensors into a few large ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The place of each original tensor inside the packed tensors."""

    groups: tuple[tuple[tuple[str, torch.Size], ...], ...]
    """Names and shapes in order, one group per packed tensor."""

    def unpack(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the original tensors by name, as views of ``packed``."""
        state: dict[str, Tensor] = {}
        for group, tensor in zip(self.groups, packed, strict=True):
            parts = tensor.split([shape.numel() for _, shape in group])
            state |= {name: part.view(shape) for (name, shape), part in zip(group, parts, strict=True)}
        return state


def pack(state: Mapping[str, Tensor]) -> tuple[Layout, list[Tensor]]:
    """Concatenate ``state`` into one flat tensor per dtype and device; differentiable.

    Tensors that outlive a chunk's temporaries should lie together in memory. Sixty small tensors spread over the heap
    keep pages from being reused: SmolLM2 then grows by twice what they hold.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault((tensor.dtype, tensor.device), []).append(name)
    layout = Layout(tuple(tuple((name, state[name].shape) for name in names) for names in groups.values()))
    return layout, [torch.cat([state[name].flatten() for name in names]) for names in groups.values()]
