"""Many small tensors in few large ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where in packed tensors each of the tensors is that were packed."""

    groups: tuple[tuple[tuple[str, torch.Size], ...], ...]
    """Names and shapes, in order; a group for every packed tensor."""

    def unpack(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors by name, as views."""
        state: dict[str, Tensor] = {}
        for group, tensor in zip(self.groups, packed, strict=True):
            parts = tensor.split([shape.numel() for _, shape in group])
            state |= {name: part.view(shape) for (name, shape), part in zip(group, parts, strict=True)}
        return state


def pack(state: Mapping[str, Tensor]) -> tuple[Layout, list[Tensor]]:
    """``state`` in one tensor (N,) for every dtype and device; differentiable.

    What outlives a chunk while its temporaries come and go should lie together. Sixty small tensors spread over the
    heap keep pages from being used again: SmolLM2 then grows by twice what they hold.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault((tensor.dtype, tensor.device), []).append(name)
    layout = Layout(tuple(tuple((name, state[name].shape) for name in names) for names in groups.values()))
    return layout, [torch.cat([state[name].flatten() for name in names]) for names in groups.values()]
