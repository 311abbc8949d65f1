"""Prefill for long contexts in training: only one chunk's activations live at a time.

A chunk is a function of its tokens and of the state after the previous chunk: keys, values, positions (see
``ChunkedPrefill.state_dict``). That function runs under activation checkpointing (https://arxiv.org/abs/1604.06174):
only the state is kept between chunks, and backward runs each chunk again from it. transformers' own checkpointing
works by layer and drops the cache in training, so nothing would be evicted.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from kvpress import BasePress
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.packed_tensors import Layout, pack
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.presses.nesting import presses_in

Results = tuple[list[Selection], dict[str, list[Tensor]], list[Tensor]]
"""A chunk's scores, loss terms and hidden states, which the next chunk does not depend on."""


def checkpointed_prefill(filling: ChunkedPrefill, context_ids: Tensor) -> Prefilled:
    """Run the chunks that are left of ``filling`` over their tokens (B, L) without keeping activations.

    Results and gradients equal ``filling.run``'s.
    Only the state is kept between two chunks; with a budget, its size is the same for every chunk. Backward costs one
    more forward. The press's settings and draws may change before backward runs; the model must not.
    """
    assert filling.traits is not None

    def run(layout: Layout | None, chunk_ids: Tensor, *packed: Tensor) -> tuple[Layout, list[Tensor], Results]:
        chunk = replace(filling)
        if layout is not None:
            chunk.load_state_dict(layout.unpack(packed))
        chunk.advance(chunk_ids)
        assert chunk.press_context is not None
        return *pack(chunk.state_dict()), (chunk.tracker.selections, chunk.press_context.losses, chunk.hidden)

    contexts = partial(_contexts, PressAsItWas(filling.traits.press))
    losses = dict[str, list[Tensor]]()
    layout: Layout | None = None
    packed: list[Tensor] = []
    first, left = filling.seen, filling.bounds[filling.chunks_done :]
    if filling.chunks_done and left:
        layout, packed = pack(filling.state_dict())
    for start, stop in left:
        # The state goes in as tensors, not hidden in an object: autograd's hooks can then move it elsewhere.
        arguments = layout, context_ids[:, start - first : stop - first], *packed
        layout, packed, (selections, terms, hidden) = checkpoint(
            run, *arguments, use_reentrant=False, context_fn=contexts
        )
        filling.tracker.selections += selections
        filling.hidden += hidden
        for name, values in terms.items():
            losses.setdefault(name, []).extend(values)
    assert filling.press_context is not None
    if layout is not None:
        filling.load_state_dict(layout.unpack(packed))
    filling.press_context.losses = losses
    return filling.result()


class PressAsItWas:
    """A reusable context manager that restores a press's settings from the time when this object was made.

    When backward runs a chunk again, the press may already have the ratio, draw or temperature of another batch. On
    exit it gets those back.
    """

    def __init__(self, press: BasePress) -> None:
        self._then = [(inner, dict(vars(inner))) for inner in presses_in(press)]
        self._now: list[tuple[BasePress, dict[str, Any]]] = []

    def __enter__(self) -> None:
        self._now = [(inner, dict(vars(inner))) for inner, _ in self._then]
        _set(self._then)

    def __exit__(self, *_: object) -> None:
        _set(self._now)


def _set(settings: list[tuple[BasePress, dict[str, Any]]]) -> None:
    for press, attributes in settings:
        vars(press).clear()
        vars(press).update(attributes)


def _contexts(then: PressAsItWas) -> tuple[nullcontext, PressAsItWas]:
    """Return the contexts of the forward and of its repetition."""
    return nullcontext(), then
