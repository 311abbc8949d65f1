"""Carry the states of layers without attention over chunks, questions and decoded tokens.

transformers continues such layers by single tokens only. Here they run on any number of tokens, differentiably: a
convolution gets its newest inputs again, and a gated delta rule (https://arxiv.org/abs/2412.06464) its last state. No
press touches them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.cache_layers import state_in
from sparsekv_pl.models.layer_kinds import linear_layers
from sparsekv_pl.presses.shadowed_method import shadowed


class CarriedRows(Protocol):
    """A cache whose rows are decoded together with those of others; see ``RowCache``."""

    def __len__(self) -> int:
        """Return the number of rows in the forward."""
        ...

    def carried(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's states by name, (places, ...)."""
        ...


@dataclass
class _Carried:
    """One layer's states in one forward."""

    layer: int
    cache: DynamicCache
    caches: Sequence[CarriedRows] | None
    lengths: Tensor | None
    """(B,), the tokens of each row that are no padding, which is on the right; None for all."""

    def get(self, name: str) -> Tensor | None:
        if self.caches is None:
            return state_in(self.cache, self.layer).states.get(name)
        return torch.cat([rows.carried(self.layer)[name][: len(rows)] for rows in self.caches])

    def set(self, name: str, state: Tensor) -> None:
        if self.caches is None:
            state_in(self.cache, self.layer).states[name] = state
            return
        for rows, own in zip(self.caches, state.split([len(rows) for rows in self.caches]), strict=True):
            rows.carried(self.layer)[name][: len(rows)] = own


@contextmanager
def carrying(
    model: PreTrainedModel,
    cache: DynamicCache,
    caches: Sequence[CarriedRows] | None = None,
    lengths: Tensor | None = None,
) -> Iterator[None]:
    """Let ``model``'s layers without attention continue from ``cache`` in the forward inside the block, and fill it.

    With ``caches`` the rows are single tokens, each of which continues from its own; ``lengths`` (B,) tells padding on
    the right from tokens. Methods of instances are replaced inside the block; classes do not change.
    """
    with ExitStack() as stack:
        for layer, module in linear_layers(model).items():
            carried = _Carried(layer, cache, caches, lengths)
            stack.callback(module.register_forward_pre_hook(_without_cache, with_kwargs=True).remove)
            convolution: Any = getattr(module, "conv1d", None) or module.conv
            stack.enter_context(shadowed(convolution, "forward", partial(_convolve, carried, convolution)))
            if hasattr(module, "chunk_gated_delta_rule"):
                stack.enter_context(shadowed(module, "chunk_gated_delta_rule", partial(_recur, carried)))
                stack.enter_context(_unset(module, "causal_conv1d_fn"))
            else:
                stack.enter_context(shadowed(module, "cuda_kernels_forward", partial(_slowly, module)))
        yield


def _convolve(
    carried: _Carried, convolution: nn.Conv1d, original: Callable[[Tensor], Tensor], inputs: Tensor
) -> Tensor:
    """Convolve inputs (B, C, T) after those before them; the first T outputs are theirs."""
    width, before = convolution.kernel_size[0] - 1, carried.get("convolved")
    if before is None:
        before = inputs.new_zeros(*inputs.shape[:2], width)
    whole = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
    carried.set("convolved", _newest(whole, width, carried.lengths))
    return original(whole)[..., width:]


def _recur(carried: _Carried, original: Callable[..., Any], *states: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule from the state before; padding neither decays it nor writes into it."""
    if carried.lengths is not None:
        tokens = torch.arange(states[0].shape[1], device=states[0].device)
        real = (tokens < carried.lengths[:, None])[..., None]
        settings |= {name: settings[name] * real for name in ("g", "beta")}
    settings |= {"initial_state": carried.get("recurrent"), "output_final_state": True}
    output, last = original(*states, **settings)
    carried.set("recurrent", last)
    return output, last


def _newest(whole: Tensor, width: int, lengths: Tensor | None) -> Tensor:
    """Return the last ``width`` inputs (B, C, width) of those that are no padding."""
    if lengths is None:
        return whole[..., whole.shape[-1] - width :].clone()  # frees the others
    index = lengths[:, None] + torch.arange(width, device=whole.device)
    return whole.gather(2, index[:, None].expand(-1, whole.shape[1], -1))


def _slowly(module: Any, _: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Convolve by the module that ``carrying`` replaces, not by a kernel."""
    result: Tensor = module.slow_forward(*args, **kwargs)
    return result


def _without_cache(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}


@contextmanager
def _unset(module: Any, name: str) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, None)
    try:
        yield
    finally:
        setattr(module, name, before)
