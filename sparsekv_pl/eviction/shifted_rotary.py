"""True RoPE positions for presses that look ahead, when a context runs in more than one chunk."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.models.layer_kinds import attentions, evicted_layers
from sparsekv_pl.models.rotary import rotary_of


@contextmanager
def queries_from(model: PreTrainedModel, position: int) -> Iterator[None]:
    """Shift the positions of presses that look ahead by RoPE (ExpectedAttention), so a chunk starts at ``position``.

    Such presses count positions from 0 within their hidden states, which is right only in the first chunk.
    """
    rotary, found = rotary_of(model), attentions(model)
    if position == 0 or rotary is None:  # Granite 4 has no positions
        yield
        return
    pressed = [found[layer] for layer in evicted_layers(model.config)]
    shifted = _ShiftedRotary(rotary, position)
    for attention in pressed:
        attention.rotary_emb = shifted
    try:
        yield
    finally:
        for attention in pressed:
            attention.rotary_emb = rotary


class _ShiftedRotary(nn.Module):
    """A rotary embedding whose positions are counted from ``offset``."""

    def __init__(self, rotary: nn.Module, offset: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.offset = offset
        self.inv_freq: Tensor = rotary.inv_freq  # type: ignore[assignment]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(x, position_ids + self.offset)
