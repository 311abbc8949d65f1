"""A layer's rotary position embedding (RoPE, https://arxiv.org/abs/2104.09864), also where it differs by layer type."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import evicted_layers, layer_kinds

NAMES = ("rotary_emb", "pos_emb")
"""Names of a decoder's rotary embedding; the second is LFM2-MoE's."""


def has_rotary(model: PreTrainedModel) -> bool:
    """Return whether the decoder has a rotary embedding, or None in its place."""
    return any(hasattr(decoder_of(model), name) for name in NAMES)


def rotary_of(model: PreTrainedModel, layer: int | None = None) -> nn.Module:
    """Return the module that a layer's cosines and sines come from: ``inv_freq`` and ``forward(x, position_ids)``.

    None: that of the layers in which presses evict. Gemma 3 has one module with frequencies by layer type. A model
    without positions (Granite 4) has None in its place.
    """
    decoder = decoder_of(model)
    rotary: Any = next((getattr(decoder, name) for name in NAMES if hasattr(decoder, name)), None)
    assert rotary is not None or has_rotary(model)  # see check_computed
    kind = layer_kinds(model.config)[evicted_layers(model.config)[0] if layer is None else layer]
    return _OfKind(rotary, kind) if hasattr(rotary, f"{kind}_inv_freq") else rotary


def inv_freq_of(model: PreTrainedModel, layer: int) -> Tensor:
    """Return a layer's RoPE frequencies (D / 2,), in radians per position."""
    return rotary_of(model, layer).inv_freq  # type: ignore[return-value]


def rope_settings(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Return the RoPE settings (``rope_parameters``) of the layers in which presses evict; empty if there are none."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kind = layer_kinds(config)[evicted_layers(config)[0]]
    by_kind = rope.get(kind)
    return by_kind if isinstance(by_kind, Mapping) else rope


class _OfKind(nn.Module):
    """A model's rotary embedding for layers of one kind."""

    def __init__(self, rotary: nn.Module, kind: str) -> None:
        super().__init__()
        self.rotary, self.kind = rotary, kind
        self.inv_freq: Tensor = getattr(rotary, f"{kind}_inv_freq")
        self.attention_scaling: float = getattr(rotary, f"{kind}_attention_scaling", 1.0)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, L, D) of positions (B, L)."""
        return self.rotary(x, position_ids, self.kind)
