"""The size of a model's KV cache, from its config alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from sparsekv_pl.models.layer_kinds import FULL, HYBRID, WINDOWS, Window, evicted_layers, layer_kinds, windows


def _convolution(text: Any) -> tuple[int, int]:
    return text.hidden_size * (text.conv_L_cache - 1), 0


def _delta_net(text: Any) -> tuple[int, int]:
    heads, keys, values = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    channels = 2 * text.linear_num_key_heads * keys + heads * values
    return channels * (text.linear_conv_kernel_dim - 1), heads * keys * values


def _state_space(text: Any) -> tuple[int, int]:
    inner = getattr(text, "mamba_d_ssm", None) or int(text.mamba_expand * text.hidden_size)
    channels = inner + 2 * text.mamba_n_groups * text.mamba_d_state
    return channels * (text.mamba_d_conv - 1), text.mamba_n_heads * text.mamba_d_head * text.mamba_d_state


STATES: dict[str, Callable[[Any], tuple[int, int]]] = {
    "conv": _convolution,
    "linear_attention": _delta_net,
    "mamba": _state_space,
    HYBRID: _state_space,
}
"""Kinds of layers with states (LFM2; Qwen3-Next; Bamba and Granite 4; Falcon-H1) -> the numbers of their states:
convolved inputs, recurrent."""


@dataclass(frozen=True)
class CacheShape:
    """The KV heads, head dimension and windows of a decoder's layers."""

    kv_heads: int
    """K, KV heads per layer."""
    head_dim: int
    """D, dimension of a head."""
    windows: tuple[Window | None, ...]
    """Per layer with keys and values, its window; None for unlimited."""
    evicted: int
    """Number of layers in which presses evict."""
    convolved: int
    """Numbers of a row's states of convolutions, in all layers."""
    recurrent: int
    """Numbers of a row's states of linear attention and state spaces, which are float32."""

    @property
    def pair_bytes(self) -> int:
        """Count of numbers (not bytes: multiply by the item size) in one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_dim

    def pairs(self, tokens: int, kept: int | None, chunk: int = 0) -> int:
        """Return the pairs per head, of all layers, after a prefill of ``tokens`` tokens that leaves ``kept``.

        None: nothing is evicted. Layers in which presses do not evict hold what later tokens see; with ``chunk``, also
        the last so many tokens, of which they have not forgotten any yet.
        """
        alone = all(window is not None for window in self.windows)
        held = 0
        for window in self.windows:
            if kept is not None and (window is None or alone):
                held += kept
            elif window is None:
                held += tokens
            else:
                held += min(tokens, window.tokens - 1 + chunk) if chunk else window.held(tokens)
        return held

    def state_bytes(self, itemsize: int) -> int:
        """Return the bytes of a row's states."""
        return self.convolved * itemsize + self.recurrent * 4


def cache_shape(config: PreTrainedConfig) -> CacheShape:
    """Read the cache's shape from ``config``, in which the decoder's config may be nested.

    Raises ``ValueError`` for latent attention and for layers whose state is not counted (Jamba).
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{text.model_type} has multi-head latent attention, whose cache is not counted: plan another")
    heads = text.num_attention_heads
    kinds = layer_kinds(config)
    kinds = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]  # the last ones may share a cache
    if hasattr(text, "mamba_d_state"):  # which transformers 5.24 calls a linear attention
        kinds = ["mamba" if kind == "linear_attention" else kind for kind in kinds]
    unknown = set(kinds) - {*WINDOWS, FULL, *STATES}
    if not hasattr(text, "mamba_n_groups"):  # Jamba's state spaces are of another kind
        unknown |= {"mamba", HYBRID} & set(kinds)
    if unknown:
        raise ValueError(f"{text.model_type} has layers of kind {sorted(unknown)}, which are not counted: plan another")
    with_pairs = (FULL, HYBRID, *WINDOWS)
    return CacheShape(
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        windows=tuple(window for window, kind in zip(windows(config), kinds, strict=False) if kind in with_pairs),
        evicted=len(evicted_layers(config)),
        convolved=sum(STATES[kind](text)[0] for kind in kinds if kind in STATES),
        recurrent=sum(STATES[kind](text)[1] for kind in kinds if kind in STATES),
    )


def kept_pairs(tokens: int, compression_ratio: float | None, budget: int | None) -> int:
    """Return the KV pairs per head that ``prefill`` keeps of ``tokens``, with the same rounding."""
    kept = int(tokens * (1 - (compression_ratio or 0.0)))
    return max(1, min(kept, budget or tokens))
