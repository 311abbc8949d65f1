"""The caches of layers in which nothing is evicted: they forget by themselves what no later token sees."""

from collections.abc import Collection, Mapping

import torch
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.limits import check_query_scales
from sparsekv_pl.eviction.rotation import Rotation, turned
from sparsekv_pl.models.layer_kinds import evicted_layers, windowed_alone, windows
from sparsekv_pl.models.rotary import inv_freq_of


def forget(model: PreTrainedModel, cache: DynamicCache, seen: int, evicted: Collection[int]) -> dict[int, int]:
    """Drop from layers with a window, but the ``evicted`` ones, the pairs that no token after the first ``seen`` sees.

    Returns layer -> the number of pairs dropped. The memory is freed; gradients flow through what stays.
    """
    dropped: dict[int, int] = {}
    for layer, window in enumerate(windows(model.config)):
        if window is None or layer in evicted:
            continue
        own = cache.layers[layer]
        assert own.keys is not None and own.values is not None
        dropped[layer] = max(0, own.keys.shape[2] - window.held(seen))
        if dropped[layer]:
            own.keys, own.values = (pairs[:, :, dropped[layer] :].clone() for pairs in (own.keys, own.values))
    return dropped


def move(
    model: PreTrainedModel,
    cache: DynamicCache,
    end: int,
    by: int,
    dropped: Mapping[int, int],
    rotation: Rotation | None,
) -> None:
    """Turn the keys of layers with a window by ``by`` positions, so that the next token goes to position ``end``.

    A press that re-rotates keys moves the text's end; what a window still sees of it moves along. ``dropped`` is what
    ``forget`` returned. ``rotation`` turns each key once from where it was computed, however often it is moved; it is
    to be called after every chunk, also with ``by`` 0.
    """
    for layer in dropped:
        own = cache.layers[layer]
        assert own.keys is not None
        if rotation is not None:
            own.keys = rotation.moved(layer, own.keys, end, by, dropped[layer])
        elif by:
            places = torch.full(own.keys.shape[:3], by, device=own.keys.device)
            own.keys = turned(own.keys, places, inv_freq_of(model, layer))


def check_next_tokens(model: PreTrainedModel, cache: DynamicCache, position: int, tokens: int) -> None:
    """Raise ``ValueError`` if the model would read ``tokens`` tokens from ``position`` on otherwise than they are here.

    They may leave a window that a press thinned out, which is possible in models without full attention alone, whose
    windows are evicted from; or see ``check_query_scales``.
    """
    check_query_scales(model, position + tokens)
    window = windowed_alone(model.config)
    if window is None or position + tokens <= window:
        return
    least = min((cache.get_seq_length(layer) for layer in evicted_layers(model.config)), default=0)
    if least < min(position, window - 1):
        raise ValueError(
            f"{tokens} tokens from position {position} on leave the window of {window} through which every layer of "
            "this model looks, and its pairs were evicted: keep context and continuation within the window, take no "
            "press, or a model with full attention in some layers (Gemma 3)"
        )
