"""Kinds of decoder layers: full attention, attention within a window, and layers without keys and values.

Presses evict in layers with full attention. The others forget by themselves: their caches stay as they are, and so
does the state of a state space beside an attention.
"""

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of

FULL = "full_attention"
HYBRID = "hybrid"
"""Full attention with a state space beside it (Falcon-H1)."""
NAMES = {"attention": FULL}
"""Names of kinds in some configs (Bamba, Granite 4) -> the usual one."""
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of layers with a limited window -> the config setting with its number of tokens."""
MAMBA2 = ("FalconH1Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer")
"""Classes of the state spaces that are continued here (eviction/state_space.py)."""


class Window(NamedTuple):
    """The keys that a query of a layer may see besides its own."""

    tokens: int
    """Number of tokens, the query's own included."""
    chunked: bool
    """True: a query sees its own chunk of ``tokens`` tokens, counted from position 0. False: the last ``tokens``."""

    def held(self, seen: int) -> int:
        """Return how many of the newest pairs may still be seen by tokens that follow the first ``seen`` ones.

        Chunks start at the first pair held, so that the pairs' order tells their chunks.
        """
        if self.chunked:
            return (seen - 1) % self.tokens + 1
        return min(seen, self.tokens - 1)


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the kind of each layer of ``config``'s decoder, as in transformers' DynamicCache."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is None:
        limited = [kind for kind, name in WINDOWS.items() if getattr(text, name, None) is not None]
        kinds = [limited[0] if limited else FULL] * text.num_hidden_layers
    kinds = [NAMES.get(kind, kind) for kind in kinds]
    return [HYBRID] * len(kinds) if text.model_type == "falcon_h1" else kinds  # transformers 5.2 says attention


def windows(config: PreTrainedConfig) -> list[Window | None]:
    """Return the window of each layer; None for one without."""
    text = config.get_text_config(decoder=True)
    return [_window(text, kind) for kind in layer_kinds(config)]


def window_of(config: PreTrainedConfig, layer: int) -> Window | None:
    """Return the window of one layer; None for one without."""
    return _window(config.get_text_config(decoder=True), layer_kinds(config)[layer])


def _window(text: PreTrainedConfig, kind: str) -> Window | None:
    tokens = getattr(text, WINDOWS[kind], None) if kind in WINDOWS else None
    return None if tokens is None else Window(tokens, kind == "chunked_attention")


def evicted_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers in which presses evict: those with full attention; if there is none, those with a window.

    A window that no token has left yet is full attention: see ``windowed_alone``.
    """
    kinds = layer_kinds(config)
    full = [layer for layer, kind in enumerate(kinds) if kind in (FULL, HYBRID)]
    return full or [layer for layer, window in enumerate(windows(config)) if window is not None]


def layers_left_alone(config: PreTrainedConfig) -> list[int]:
    """Return the layers in which presses do not evict."""
    evicted = evicted_layers(config)
    return [layer for layer in range(len(layer_kinds(config))) if layer not in evicted]


def windowed_alone(config: PreTrainedConfig) -> int | None:
    """Return the smallest window, in tokens, of a model without full attention; None for other models."""
    found = [window.tokens for window in windows(config) if window is not None]
    return min(found) if found and not {FULL, HYBRID} & set(layer_kinds(config)) else None


def attentions(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return layer -> attention module of ``model``'s decoder; layers without attention are left out."""
    found = ((index, getattr(layer, "self_attn", None)) for index, layer in enumerate(decoder_of(model).layers))
    return {index: attention for index, attention in found if attention is not None}  # Granite 4 has None


def linear_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return layer -> the module in place of an attention or beside it whose state is carried over chunks and tokens.

    Those are the short convolutions of LFM2, the gated delta nets of Qwen3-Next and Qwen3.5, and ``MAMBA2``.
    """
    found = dict[int, nn.Module]()
    for index, layer in enumerate(getattr(decoder_of(model), "layers", [])):
        for name, known in (("conv", _is_convolution), ("linear_attn", _is_delta_net), ("mamba", _is_mamba2)):
            mixer: Any = getattr(layer, name, None)
            if mixer is not None and known(mixer):
                found[index] = mixer
    return found


def _is_convolution(mixer: nn.Module) -> bool:
    return type(mixer).__name__.endswith("ShortConv") and hasattr(mixer, "conv")


def _is_delta_net(mixer: nn.Module) -> bool:
    return type(mixer).__name__.endswith("GatedDeltaNet") and hasattr(mixer, "conv1d")


def _is_mamba2(mixer: nn.Module) -> bool:
    return type(mixer).__name__ in MAMBA2


def others_line(model: PreTrainedModel) -> str:
    """Describe in one line the layers in which nothing is evicted, or a state is kept; empty if there are none."""
    kinds, evicted = layer_kinds(model.config), evicted_layers(model.config)
    others = layers_left_alone(model.config)
    if not others:
        beside = set(linear_layers(model)) & set(evicted)
        line = (
            f"{type(model).__name__}: {len(beside)} of {len(kinds)} layers have a state space beside their attention; "
            "presses evict from the attention's cache, and the states stay as they are; their bytes are counted too"
        )
        return line if beside else ""
    limits = windows(model.config)
    parts = []
    for what in dict.fromkeys((kinds[index], limits[index]) for index in others):
        count = sum((kinds[index], limits[index]) == what for index in others)
        parts.append(f"{count} have {_described(*what)}")
    return (
        f"{type(model).__name__}: presses evict in the {len(evicted)} of {len(kinds)} layers with full attention; "
        f"{', '.join(parts)} and keep their caches, whose bytes are counted too"
    )


def _described(kind: str, window: Window | None) -> str:
    if window is None:
        return f"no attention but a state ({kind})"
    return f"{'chunks' if window.chunked else 'a window'} of {window.tokens:,} tokens"
