"""The data that a prefill and its presses exchange: the keys' tokens, soft weights, losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv_pl.presses.step_draws import row_numbers

PRESS_CONTEXT = "press_context"
"""The keyword of the model's forward that carries ``PressContext``; a press finds it in its ``kwargs``."""


@dataclass
class PressContext:
    """Data of one prefill, made by ``ChunkedPrefill``, for presses that do more than shrink the cache."""

    start: int = 0
    """The context position of this chunk's first token."""
    token_ids: Tensor | None = None
    """(B, L) int64, the context's tokens up to the end of this chunk; None if no press reads them."""
    positions: Mapping[int, Tensor] = field(default_factory=dict)
    """layer -> (B, K, S) int64, the context positions of the keys that the cache held before this chunk."""
    key_log_weights: dict[int, Tensor] = field(default_factory=dict)
    """layer -> (B, K, S), added to the attention logits of the kept keys in later passes; 0 changes nothing."""
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    """name -> scalars, one per layer and chunk: terms that an objective may add."""
    _numbered: tuple[Tensor, list[int]] | None = field(default=None, init=False, repr=False, compare=False)

    def row_numbers(self, chunk_ids: Tensor) -> list[int]:
        """Call ``step_draws.row_numbers``, once for all layers of a chunk: it waits for the device."""
        if self._numbered is None or self._numbered[0] is not chunk_ids:
            self._numbered = chunk_ids, row_numbers(chunk_ids)
        return self._numbered[1]


def press_context_in(kwargs: Mapping[str, Any]) -> PressContext | None:
    """Return the press context in ``kwargs`` of a press; None in other forwards, such as kvpress's pipeline."""
    return kwargs.get(PRESS_CONTEXT)


def held_positions(module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the context positions (B, K, held) of the keys that an attention layer held before this chunk.

    None where nothing is held, or no prefill of this project says what, as in kvpress's pipeline.
    """
    context = press_context_in(kwargs)
    return None if context is None else context.positions.get(int(module.layer_idx))  # type: ignore[arg-type]


def key_positions(module: nn.Module, keys: Tensor, read: int, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the context positions (B, K, S) of ``keys`` (B, K, S, D), the newest of the ``read`` tokens at the end.

    Without ``held_positions`` they are 0..S-1.
    """
    batch, heads, length = keys.shape[:3]
    held = held_positions(module, kwargs)
    if held is None:
        return torch.arange(length, device=keys.device).expand(batch, heads, -1)
    new = torch.arange(read - (length - held.shape[-1]), read, device=keys.device)
    return torch.cat([held, new.expand(batch, heads, -1)], dim=-1)
