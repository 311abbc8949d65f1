"""Put one document's cache behind another's: its keys are turned to the positions that follow.

RoPE depends on distances alone: a document that was read by itself and is moved as a whole has the keys that it would
have, read by itself at the later positions. Neither document has seen the other; the questions see both.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.limits import check_rope, check_window, position_limit
from sparsekv_pl.eviction.press_model_check import layers_not_turned
from sparsekv_pl.eviction.rotation import turned
from sparsekv_pl.models.layer_kinds import evicted_layers, linear_layers, windows
from sparsekv_pl.models.rotary import inv_freq_of
from sparsekv_pl.usage.kept_context import LAYERS, KeptContext


def merged(model: PreTrainedModel, first: KeptContext, second: KeptContext, re_rotated: bool) -> KeptContext:
    """Return ``first`` followed by ``second``, in one rotation of each key of ``second``.

    Quantised pairs are rounded again, as turned keys and shared groups have other scales.

    ``re_rotated`` says that both presses re-rotated their keys, which then stay at 0..S-1 in every layer.

    Raises
    ------
    ValueError
        If the model's keys cannot be turned, or there are no positions for both.
    """
    check_merge(model, first, second)
    stored, first, second = first, first.whole(), second.whole()
    tensors: dict[str, Tensor] = {}
    limits, evicted, tokens = windows(model.config), evicted_layers(model.config), first.tokens + second.tokens
    for layer in range(first.layers):
        pairs, window = _layer(model, first, second, layer, re_rotated and layer in evicted), limits[layer]
        seen = None if window is None or layer in evicted else window.held(tokens)
        tensors |= {f"{kind}.{layer}": _newest(kind, tensor, seen).contiguous() for kind, tensor in pairs}
    bounds = [*first.bounds, *((first.tokens + start, first.tokens + stop) for start, stop in second.bounds)]
    ids = torch.cat([first.ids, second.ids], dim=1)
    position = first.next_position + second.next_position
    return KeptContext(ids, bounds, position, tensors, evicted=first.evicted).stored_like(stored)


def check_merge(model: PreTrainedModel, first: KeptContext, second: KeptContext) -> None:
    """Raise ``ValueError``, with the reason, if no positions or no rotation allow a merge."""
    if first.quantisation != second.quantisation:
        mine, theirs = (str(one.quantisation or "whole") for one in (first, second))
        raise ValueError(
            f"merge: the first cache has its pairs {mine}, the second {theirs}: prefill both with the same quantisation"
        )
    positions = first.next_position + second.next_position
    if linear_layers(model):
        raise ValueError(
            f"merge: {type(model).__name__} has layers {list(linear_layers(model))} without attention, whose state "
            "after both documents does not follow from their states. Prefill both documents together instead"
        )
    limit = position_limit(model)
    if limit is not None and positions > limit:
        raise ValueError(
            f"merge: the documents take {first.next_position} and {second.next_position} positions, {positions} "
            f"together, and this model was trained on {limit} (max_position_embeddings): merge shorter documents, or "
            "prefill them under a press that re-rotates keys (KeyRerotation(KeyDiff))"
        )
    try:
        check_window(model, positions + 1)  # a question follows
        check_rope(model, 1, 1, rotates=True)
    except ValueError as error:
        raise ValueError(f"merge: {str(error).partition(': ')[0]}. Prefill both documents together instead") from error
    wrong = layers_not_turned(model)
    if wrong:
        raise ValueError(
            f"merge: the keys of {type(model).__name__} do not follow from its RoPE (rotary_emb) in layers {wrong}, so "
            "they cannot be moved to the positions after the first document. Prefill both documents together instead"
        )


def _layer(
    model: PreTrainedModel, first: KeptContext, second: KeptContext, layer: int, re_rotated: bool
) -> Iterator[tuple[str, Tensor]]:
    own = [{kind: context.tensors.get(f"{kind}.{layer}") for kind in LAYERS} for context in (first, second)]
    (keys, values), (more_keys, more_values) = ((one["keys"], one["values"]) for one in own)
    assert keys is not None and values is not None and more_keys is not None and more_values is not None
    inv_freq = inv_freq_of(model, layer)
    places = [one["positions"] for one in own]
    if places[0] is not None and places[1] is not None:
        yield "positions", torch.cat([places[0], places[1] + first.tokens], dim=-1)
    yield "values", torch.cat([values, more_values], dim=2)
    if not re_rotated:
        by = torch.full(more_keys.shape[:3], first.next_position, device=more_keys.device)
        yield "keys", torch.cat([keys, turned(more_keys, by, inv_freq)], dim=2)
        return
    kept, at = (torch.cat(parts, dim=2) for parts in zip(*(_as_first_kept(one) for one in own), strict=True))
    here = torch.arange(kept.shape[2], device=kept.device).expand(kept.shape[:3])
    yield "first", kept
    yield "places", at
    yield "keys", torch.cat([keys, turned(kept, here - at, inv_freq)[:, :, keys.shape[2] :]], dim=2)


def _newest(kind: str, tensor: Tensor, seen: int | None) -> Tensor:
    """Return the pairs of a layer with a window that later tokens see, the newest ``seen``; None for all."""
    if seen is None or kind not in ("keys", "values"):
        return tensor
    return tensor[:, :, max(0, tensor.shape[2] - seen) :]


def _as_first_kept(own: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return re-rotated keys as they were first kept, and their positions then: see ``Rotation``."""
    keys = own["keys"]
    if own["first"] is not None:
        return own["first"], own["places"]
    return keys, torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
