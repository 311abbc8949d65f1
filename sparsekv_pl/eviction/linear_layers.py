"""Carry the states of convolutions, linear attention and state spaces over chunks, questions and decoded tokens.

transformers continues such layers by single tokens only, or in place. Here they run on any number of tokens,
differentiably: a convolution gets its newest inputs again; a gated delta rule (https://arxiv.org/abs/2412.06464) and a
state space (state_space.py) their last state. No press touches them.
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
from sparsekv_pl.eviction.state_space import mamba2
from sparsekv_pl.models.layer_kinds import MAMBA2, linear_layers
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
class Carried:
    """One mixer's states in one forward. It is also what transformers 5.24 asks for them instead of a cache."""

    layer: int
    cache: DynamicCache
    caches: Sequence[CarriedRows] | None
    rows: Tensor | None = None
    """Rows of the batch that run at present, int64; None for all."""
    batch: int = 0
    """Rows of the batch, if not all run together."""

    def get(self, name: str) -> Tensor | None:
        """Return the state of that name of the rows that run; None at the start of a text."""
        if self.caches is not None:
            return torch.cat([rows.carried(self.layer)[name][: len(rows)] for rows in self.caches])
        state = state_in(self.cache, self.layer).states.get(name)
        return state if state is None or self.rows is None else state[self.rows]

    def set(self, name: str, state: Tensor) -> None:
        """Keep a state of the rows that run."""
        if self.caches is not None:
            for rows, own in zip(self.caches, state.split([len(rows) for rows in self.caches]), strict=True):
                rows.carried(self.layer)[name][: len(rows)] = own
            return
        states = state_in(self.cache, self.layer).states
        if self.rows is not None:
            whole = states[name] if name in states else state.new_zeros(self.batch, *state.shape[1:])
            state = whole.index_copy(0, self.rows, state)
        states[name] = state

    def with_inputs(self, inputs: Tensor, width: int) -> Tensor:
        """Return a convolution's inputs (B, C, T) after the ``width`` before them, and keep the newest ones."""
        before = self.get("convolved")
        if before is None:
            before = inputs.new_zeros(*inputs.shape[:2], width)
        whole = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
        self.set("convolved", whole[..., whole.shape[-1] - width :].clone())  # frees the others
        return whole

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the newest inputs; transformers tells the start of a text by None."""
        assert (layer_idx, state_idx) == (self.layer, 0)
        return self.get("convolved")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of the linear attention."""
        assert (layer_idx, state_idx) == (self.layer, 0)
        return self.get("recurrent")

    def update_conv_state(self, inputs: Tensor, layer_idx: int, conv_kernel_size: int) -> Tensor:
        """See ``with_inputs``."""
        assert layer_idx == self.layer
        return self.with_inputs(inputs, conv_kernel_size - 1)

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> Tensor:
        """Keep the state of the linear attention."""
        assert layer_idx == self.layer
        self.set("recurrent", state)
        return state

    def is_recording_past(self, layer_idx: int) -> bool:
        """Ask for an update that is not in place, also of a single token."""
        assert layer_idx == self.layer
        return True


@contextmanager
def carrying(
    model: PreTrainedModel,
    cache: DynamicCache,
    caches: Sequence[CarriedRows] | None = None,
    lengths: Tensor | None = None,
) -> Iterator[None]:
    """Let ``model``'s mixers with a state continue from ``cache`` in the forward inside the block, and fill it.

    With ``caches`` the rows are single tokens, each of which continues from its own; ``lengths`` (B,) tells padding on
    the right from tokens. Methods of instances are replaced inside the block; classes do not change.
    """
    mixers = linear_layers(model)
    if mixers and not hasattr(cache, "has_previous_state"):
        cache.has_previous_state = True  # type: ignore[attr-defined]  # which Falcon-H1's decoder reads
    groups = _rows_by_length(lengths) if mixers and lengths is not None else None
    with ExitStack() as stack:
        for layer, module in mixers.items():
            carried = Carried(layer, cache, caches)
            if type(module).__name__ in MAMBA2:
                own: Callable[..., Tensor] = partial(_mamba2, module, carried)
            else:
                own = partial(_continued, module, carried)
            stack.enter_context(shadowed(module, "forward", partial(_by_length, carried, groups, own)))
        yield


def _rows_by_length(lengths: Tensor) -> list[tuple[int, Tensor]]:
    numbers = lengths.tolist()
    found = ((length, [row for row, own in enumerate(numbers) if own == length]) for length in sorted(set(numbers)))
    return [(length, torch.tensor(rows, device=lengths.device)) for length, rows in found]


def _by_length(
    carried: Carried,
    groups: Sequence[tuple[int, Tensor]] | None,
    own: Callable[..., Tensor],
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Run a mixer on hidden states (B, T, E); rows of different lengths apart, so that no padding enters a state."""
    if groups is None or [length for length, _ in groups] == [hidden_states.shape[1]]:
        return own(forward, hidden_states, *args, **kwargs)
    output, carried.batch = torch.zeros_like(hidden_states), len(hidden_states)
    for length, rows in groups:
        carried.rows = rows
        output[rows, :length] = own(forward, hidden_states[rows, :length], *args, **kwargs).to(output.dtype)
    carried.rows = None
    return output


def _mamba2(module: nn.Module, carried: Carried, _: Any, hidden_states: Tensor, *__: Any, **___: Any) -> Tensor:
    return mamba2(module, carried, hidden_states)


def _continued(
    module: nn.Module,
    carried: Carried,
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Run the model's own forward of a convolution or a gated delta net from the state before."""
    if "cache" in kwargs:  # transformers 5.24
        return forward(hidden_states, *args, **kwargs | {"cache": carried})
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    convolution: Any = getattr(module, "conv1d", None) or module.conv
    with ExitStack() as stack:
        stack.enter_context(shadowed(convolution, "forward", partial(_convolve, carried, convolution)))
        if hasattr(module, "chunk_gated_delta_rule"):
            stack.enter_context(shadowed(module, "chunk_gated_delta_rule", partial(_recur, carried)))
            stack.enter_context(_unset(module, "causal_conv1d_fn"))
        else:
            stack.enter_context(shadowed(module, "cuda_kernels_forward", partial(_slowly, module)))
        return forward(hidden_states, *args, **kwargs)


def _convolve(carried: Carried, convolution: nn.Conv1d, original: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Convolve inputs (B, C, T) after those before them; the first T outputs are theirs."""
    width = convolution.kernel_size[0] - 1
    return original(carried.with_inputs(inputs, width))[..., width:]


def _recur(carried: Carried, original: Callable[..., Any], *states: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule from the state before."""
    settings |= {"initial_state": carried.get("recurrent"), "output_final_state": True}
    output, last = original(*states, **settings)
    carried.set("recurrent", last)
    return output, last


def _slowly(module: Any, _: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Convolve by the module that ``_continued`` replaces, not by a kernel."""
    result: Tensor = module.slow_forward(*args, **kwargs)
    return result


@contextmanager
def _unset(module: Any, name: str) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, None)
    try:
        yield
    finally:
        setattr(module, name, before)
