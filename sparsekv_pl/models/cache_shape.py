"""The size of a model's KV cache, from its config alone."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from sparsekv_pl.models.layer_kinds import FULL, WINDOWS, layer_kinds


@dataclass(frozen=True)
class CacheShape:
    """The KV heads, head dimension and windows of a decoder's layers."""

    kv_heads: int
    """K, KV heads per layer."""
    head_dim: int
    """D, dimension of a head."""
    windows: tuple[int | None, ...]
    """Per layer, the window in tokens; None for unlimited."""

    @property
    def pair_bytes(self) -> int:
        """Count of numbers (not bytes: multiply by the item size) in one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_dim


def cache_shape(config: PreTrainedConfig) -> CacheShape:
    """Read the cache's shape from ``config``, in which the decoder's config may be nested.

    Raises ``ValueError`` for layers without plain keys and values: latent attention, state spaces.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{text.model_type} has multi-head latent attention, whose cache is not counted: plan another")
    heads = text.num_attention_heads
    kinds = layer_kinds(config)
    kinds = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]  # the last ones may share a cache
    unknown = set(kinds) - {*WINDOWS, FULL}
    if unknown:
        raise ValueError(f"{text.model_type} has layers of kind {sorted(unknown)}, which are not counted: plan another")
    return CacheShape(
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        windows=tuple(getattr(text, WINDOWS[kind]) if kind in WINDOWS else None for kind in kinds),
    )


def kept_pairs(tokens: int, compression_ratio: float | None, budget: int | None) -> int:
    """Return the KV pairs per head that ``prefill`` keeps of ``tokens``, with the same rounding."""
    kept = int(tokens * (1 - (compression_ratio or 0.0)))
    return max(1, min(kept, budget or tokens))


def windowed_pairs(tokens: int, chunk: int, window: int | None) -> int:
    """Return the KV pairs per head that transformers' cache has allocated after the last chunk, for ``window``.

    It keeps window - 1 tokens as a view into the last chunk's tensor, whose memory is not freed before the next
    forward.
    """
    return tokens if window is None else min(tokens, window - 1 + chunk)
