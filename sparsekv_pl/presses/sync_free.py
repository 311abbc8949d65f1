"""Run kvpress's presses on a GPU without synchronising in every layer."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from sparsekv_pl.models.cache_keyword import with_cache
from sparsekv_pl.presses.traits import PressTraits


class NoWaiting(TorchFunctionMode):
    """Keep presses from reading numbers back from ``device`` inside the block; their results do not change.

    Scorers pad their scores with ``scores.max().item() + 1`` (SnapKV, TOVA, ExpectedAttention, Finch, CAP): here that
    number stays a tensor on the device. ExpectedAttentionPress makes positions and unit matrices on the CPU and copies
    them in every layer: here they are made on the device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.arange, torch.eye):
            return func(*args, **{"device": self.device} | kwargs)
        if func is torch.Tensor.item and args[0].device.type != "cpu":
            return args[0].detach()
        if func is pad and isinstance(kwargs.get("value"), Tensor):
            return _padded(*args, **kwargs)
        return func(*args, **kwargs)


def _padded(values: Tensor, widths: Sequence[int], mode: str, value: Tensor) -> Tensor:
    """Pad with a ``value`` that is a tensor."""
    inside = pad(torch.ones_like(values, dtype=torch.bool), widths, mode, False)
    return torch.where(inside, pad(values, widths, mode, 0.0), value.to(values.dtype))


def no_waiting_on(device: torch.device) -> AbstractContextManager[Any]:
    """Return ``NoWaiting(device)``; on the CPU, where nothing has to wait, an empty context."""
    return nullcontext() if device.type == "cpu" else NoWaiting(device)


@contextmanager
def no_waiting(traits: PressTraits) -> Iterator[None]:
    """Run the hooks of a press and of all presses in it under ``NoWaiting`` inside the block.

    Each instance's ``forward_hook`` is replaced inside the block; classes do not change.
    """
    presses = [part.press for part in traits.parts]
    for inner in presses:
        inner.forward_hook = partial(_hook, inner)
    try:
        yield
    finally:
        for inner in presses:
            vars(inner).pop("forward_hook", None)


def _hook(press: BasePress, module: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Any) -> Any:
    with no_waiting_on(kwargs["hidden_states"].device):
        return type(press).forward_hook(press, module, inputs, with_cache(kwargs), output)
