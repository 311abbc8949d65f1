"""The tokens of the keys that a press selects from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.presses.press_context import held_positions, key_positions, press_context_in

TOKEN_IDS = "token_ids"
"""The keyword by which attention layers get the forward's token ids."""


@dataclass(frozen=True)
class KeyTokens:
    """The context's token ids so far, and each key's position in it."""

    ids: Tensor
    """(B, L) int64."""
    positions: Tensor
    """(B, K, S) int64, indices into ``ids``."""

    def at_keys(self, values: Tensor) -> Tensor:
        """Gather ``values`` (B, L), given per token, for every key: (B, K, S)."""
        heads = self.positions.shape[1]
        return values[:, None].expand(-1, heads, -1).gather(-1, self.positions)


def key_tokens(module: nn.Module, keys: Tensor, kwargs: Mapping[str, Any]) -> KeyTokens | None:
    """Find the tokens of ``keys`` (B, K, S, D) from ``kwargs`` of a press; None if they are unknown.

    They are known in this project's prefill, in one chunk or many, and in one forward over the whole context under a
    ``ReadsTokens`` press. They are unknown for parts of the keys (ChunkPress) and in decoding.
    """
    press_context = press_context_in(kwargs)
    ids = kwargs.get(TOKEN_IDS) if press_context is None else press_context.token_ids
    if ids is None:
        return None
    held, read, length = held_positions(module, kwargs), ids.shape[1], keys.shape[2]
    # More than the newest chunk's: if the chunk before evicted nothing, its keys are not among ``held``.
    known = length == read if held is None else length - held.shape[-1] >= kwargs["hidden_states"].shape[1]
    return KeyTokens(ids.to(keys.device), key_positions(module, keys, read, kwargs)) if known else None


class ReadsTokens:
    """Mixin for presses that read token ids."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """See ``pass_token_ids``. Wrappers call this method of an inner press, but never its ``__call__``."""
        pass_token_ids(model)


def pass_token_ids(model: PreTrainedModel) -> None:
    """Pass the token ids of every forward to the presses on ``model``, until no press is on it."""
    decoder = decoder_of(model)
    if any(isinstance(hook, _PassTokenIds) for hook in decoder._forward_pre_hooks.values()):
        return
    hook = _PassTokenIds()
    hook.handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)


class _PassTokenIds:
    """A forward hook that adds token ids to the keywords of every layer and removes itself when unused."""

    handle: Any

    def __call__(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not any(_pressed(layer.self_attn) for layer in decoder.layers if hasattr(layer, "self_attn")):
            self.handle.remove()
            return None
        ids = kwargs.get("input_ids", args[0] if args else None)
        return None if ids is None or TOKEN_IDS in kwargs else (args, kwargs | {TOKEN_IDS: ids})


def _pressed(attention: nn.Module) -> bool:
    return any(isinstance(getattr(hook, "__self__", None), BasePress) for hook in attention._forward_hooks.values())


def real_keys(keys: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return (B, S) bool, False where a key (B, K, S, D) is padding, on either side; None if nothing is padded.

    Read from the layer's attention mask. This project's own forward takes no padding and passes no mask.

    Raises
    ------
    ValueError
        For a padded batch from which another press has removed keys: it is unknown which keys are padding.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if mask.dim() == 4:  # (B, 1, Q, S): a key that no query sees is padding
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = visible.any(dim=2)[:, 0]
    mask = mask.bool()
    if bool(mask.all()):
        return None
    if mask.shape[1] != _whole(keys):
        raise ValueError(
            f"a padded batch had {mask.shape[1]} keys, {keys.shape[2]} are left, and it is unknown which of them are "
            "padding: put this press first, or use rows of equal length"
        )
    start = first_key(keys)
    return mask[:, start : start + keys.shape[2]]


def key_places(keys: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Number the real keys of each row from 0, (B, S) int64, -1 for padding. ``keys`` are (B, K, S, D).

    Raises ``ValueError`` as ``real_keys`` does.
    """
    real = real_keys(keys, kwargs)
    if real is None:
        return torch.arange(keys.shape[2], device=keys.device).expand(len(keys), -1)
    return (real.cumsum(1) - 1).masked_fill(~real, -1)


def first_key(keys: Tensor) -> int:
    """Return where ``keys`` (B, K, S, D) begin in the cache: 0, except for parts that kvpress's ChunkPress passes."""
    return keys.storage_offset() // keys.stride(2) % _whole(keys)


def _whole(keys: Tensor) -> int:
    """Return the number of keys per head in the tensor that ``keys`` (B, K, S, D) are a view of."""
    return max(keys.shape[2], keys.stride(1) // keys.stride(2))
