"""True RoPE positions for presses that look ahead, when a context runs in more than one chunk."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of


@contextmanager
def queries_from(model: PreTrainedModel, position: int) -> Iterator[None]:
    """Shift the positions of presses that look ahead by RoPE (ExpectedAttention), so a chunk starts at ``position``.

    Such presses count positions from 0 within their hidden states, which is right only in the first chunk.
    """
    if position == 0:
        yield
        return
    decoder = decoder_of(model)
    shifted = _ShiftedRotary(decoder.rotary_emb, position)
    for layer in decoder.layers:
        layer.self_attn.rotary_emb = shifted
    try:
        yield
    finally:
        for layer in decoder.layers:
            layer.self_attn.rotary_emb = decoder.rotary_emb


class _ShiftedRotary(nn.Module):
    """A rotary embedding whose positions are counted from ``offset``."""

    def __init__(self, rotary: nn.Module, offset: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.offset = offset
        self.inv_freq = rotary.inv_freq

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(x, position_ids + self.offset)
