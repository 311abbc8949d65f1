"""Attention of the newest tokens over an evicted cache, registered with transformers under the name ``CACHED``.

It differs from transformers' own functions in two ways. The causal mask is aligned to the lower right in each layer
separately, so continuations are right after an eviction, also if layers keep different numbers of pairs (transformers
builds one mask for all layers; PyTorch's ``is_causal`` aligns to the upper left). And it takes keywords of the model's
forward: an ``observer`` gets the queries, keys and values of each layer, a ``selector`` chooses the key blocks that are
attended to. ``passing`` gives a keyword to every forward inside a block.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import kvpress  # noqa: F401  wraps all registered attention functions when imported, so ours is registered later
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from sparsekv_pl.attention.attention_by_rule import attention_by_rule
from sparsekv_pl.attention.block_sparse import block_sparse_attention
from sparsekv_pl.attention.blocks import Selector
from sparsekv_pl.attention.handed_on import handed_on
from sparsekv_pl.attention.one_query import one_query
from sparsekv_pl.attention.visible_keys import key_weights, visible_keys
from sparsekv_pl.attention.windows import window_mask
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import Window, evicted_layers, window_of
from sparsekv_pl.models.softmax_rule import KnowsRules, SoftmaxRule, check_plain

CACHED = "sparsekv_cached"
"""The name under which transformers finds this attention."""

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes layer_idx, queries (B, H, T, D), keys and values (B, K, S, D) after RoPE; S counts cache and new tokens.

Logits are dot products over sqrt(D): if a model has another factor, the queries are scaled accordingly. Weights are
their softmax; under another rule (softmax_rule.py), an observer that ``KnowsRules`` gets it, and others are refused."""


@dataclass(frozen=True)
class EveryLayer(KnowsRules):
    """An observer that also gets the layers in which nothing is evicted; a window may hold the newest keys alone.

    Of queries and keys only: it gets no rule.
    """

    observer: Observer

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *_: SoftmaxRule) -> None:
        self.observer(layer, query, key, value)


class RowCache(Protocol):
    """A cache whose rows run in one forward with rows of other caches, one token per row."""

    masked: Sequence[Sequence[Tensor] | None]
    """Per layer, the ``masked_key_indices`` of a head-wise press, or None."""
    visible: Tensor
    """(rows, R) bool, True for those of the newest R keys that each row may see."""
    seconds: float
    """Time spent on attention to this cache."""

    def __len__(self) -> int:
        """Return the number of rows in the forward."""
        ...

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new pairs (rows, K, 1, D) and return all its keys and values (rows, K, S, D)."""
        ...


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    observer: Observer | None = None,
    selector: Selector | None = None,
    newest_visible: Tensor | None = None,
    key_log_weights: Mapping[int, Tensor] | None = None,
    caches: Sequence[RowCache] | None = None,
    reached: set[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute scaled dot-product attention, causal and aligned to the lower right.

    Returns (B, T, H, D) and None. Head-wise presses (AdaKVPress) set ``module.masked_key_indices``. kvpress hides those
    keys by overwriting them with fake ones, which need not exist for more than one query; here they are masked, and the
    cache does not change.

    Parameters
    ----------
    module, query, key, value
        The attention layer, its queries (B, H, T, D), keys and values (B, K, S, D).
    attention_mask
        None: transformers makes no mask (``_no_mask``), and one that a layer makes by itself raises ``ValueError``.
    observer
        Gets the layer's queries, keys and values, if presses evict in the layer or it is an ``EveryLayer``.
    selector
        Chooses key blocks; None for dense attention.
    newest_visible
        (B, R) bool, which of the newest R keys each row may see: questions of different lengths are padded, and a cache
        keeps the padding.
    key_log_weights
        layer -> (B, K, S'), added to the logits of the oldest S' keys (SoftThresholdPress fades keys out).
    caches
        The rows are then single tokens that attend to their own cache and are appended to it.
    reached
        The layer is added to it: a sign that the decoder hands keywords on.
    **kwargs
        transformers' own keywords, such as ``scaling``, the factor of the dot products.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} weighs keys by a mask of its own: choose a model without")
    if reached is not None:
        reached.add(layer)
    if caches is not None:
        looking = {"observer": observer, "selector": selector} | kwargs
        return _to_each_cache(caches, layer, module, query, key, value, **looking), None
    window = window_of(module.config, layer)  # type: ignore[arg-type]
    near = None if window is None else window_mask(window, query.shape[2], key.shape[2], key.device, newest_visible)
    shown = _scaled_as_usual(query, kwargs.get("scaling"))
    rule = SoftmaxRule(kwargs.get("softcap"), kwargs.get("s_aux"))
    every = isinstance(observer, EveryLayer)
    if observer is not None and (every or layer in evicted_layers(module.config)):  # type: ignore[arg-type]
        if not every:
            _check_far(window, near)
        _show(observer, rule, layer, shown, key, value)
    if selector is not None:
        _check_far(window, near)
        if (blocks := selector(layer, shown, key)) is not None:
            check_plain(rule, "block-sparse attention")
            _check_unmasked(module, newest_visible)
            return block_sparse_attention(query, key, value, blocks, kwargs.get("scaling")).transpose(1, 2), None
    if query.shape[2] == key.shape[2]:
        module.masked_key_indices = None  # type: ignore[assignment]  # a new context
    masked = getattr(module, "masked_key_indices", None)
    mask = visible_keys(query, key, near, masked, newest_visible)
    if key_log_weights and layer in key_log_weights:
        mask = key_weights(key_log_weights[layer], mask, query, key)
    return _attended(module, query, key, value, mask, rule, **kwargs)


def _attended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: SoftmaxRule, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend by ``rule`` where ``mask`` allows it, in the way that is fastest on this device."""
    if not rule.plain:
        settings = {name: kwargs[name] for name in ("scaling", "dropout") if name in kwargs}
        return attention_by_rule(query, key, value, mask, rule, **settings), None
    on_cpu, hides = query.device.type == "cpu", mask is not None and mask.dtype == torch.bool
    if on_cpu and query.shape[2] == 1 and (mask is None or hides) and not torch.is_grad_enabled():
        return one_query(query, key, value, mask, kwargs.get("scaling")), None
    if on_cpu and mask is not None and hides:
        return _masked(query, key, value, mask, **kwargs), None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _show(observer: Observer, rule: SoftmaxRule, layer: int, *states: Tensor) -> None:
    """Let ``observer`` see a layer. Raises ``ValueError`` if it does not know the layer's rule."""
    if rule.plain:
        observer(layer, *states)
        return
    if not isinstance(observer, KnowsRules):
        check_plain(rule, type(observer).__name__)
    observer(layer, *states, rule)  # type: ignore[call-arg]


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> Tensor:
    """Attend like transformers, (B, T, H, D), without its copies of keys and values for every query head.

    transformers makes those copies whenever there is a mask; PyTorch's CPU kernel does not need them.
    """
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous()


def _to_each_cache(
    caches: Sequence[RowCache], layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **looking: Any
) -> Tensor:
    """Let each cache's rows, single tokens in the caches' order, attend to their own cache; return (rows, 1, H, D)."""
    counts, attended = [len(cache) for cache in caches], []
    for cache, own, *new in zip(caches, query.split(counts), key.split(counts), value.split(counts), strict=True):
        started = time.perf_counter()
        keys, values = cache.joined(layer, *new)
        if looking["selector"] is not None or looking["observer"] is not None:
            keys, values = keys.to(own.dtype), values.to(own.dtype)
        module.masked_key_indices = cache.masked[layer]  # type: ignore[assignment]
        visible = cache.visible.to(own.device)
        attended.append(cached_attention(module, own, keys, values, None, newest_visible=visible, **looking)[0])
        cache.seconds += time.perf_counter() - started
    module.masked_key_indices = None  # type: ignore[assignment]
    return torch.cat(attended)


def _scaled_as_usual(query: Tensor, scaling: float | None) -> Tensor:
    """Scale queries so that their dot products over sqrt(D) are the logits, also if a model has another factor."""
    factor = 1.0 if scaling is None else scaling * query.shape[-1] ** 0.5
    return query if abs(factor - 1) < 1e-6 else query * factor


def _check_far(window: Window | None, near: Tensor | None) -> None:
    """Raise ``ValueError`` where a window hides keys from what measures or selects attention to all of them."""
    if window is not None and near is not None:
        raise ValueError(
            f"this model's layers look back {window.tokens} tokens only, and attention to more is measured: use "
            "contexts within that window, or a model with full attention"
        )


def _check_unmasked(module: nn.Module, newest_visible: Tensor | None) -> None:
    padded = newest_visible is not None and not bool(newest_visible.all())
    if padded or getattr(module, "masked_key_indices", None) is not None:
        raise ValueError(
            "block-sparse attention takes neither padded rows nor a head-wise press: use batches of one row "
            "(data.batch_size=1) and another press"
        )


def _no_mask(attention_mask: Tensor | None = None, **_: Any) -> None:
    """Build no mask in place of transformers' function, so that no other implementation's mask is passed.

    Raises ``ValueError`` for padding, which this attention does not support.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention over an evicted cache takes no padding: use contexts of equal length")


AttentionInterface.register(CACHED, cached_attention)
AttentionMaskInterface.register(CACHED, _no_mask)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Compute ``model``'s attention with the registered function ``name`` inside the block."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        with handed_on(model):
            yield
    finally:
        config._attn_implementation = before


@contextmanager
def passing(model: PreTrainedModel, **attention: Any) -> Iterator[None]:
    """Give every forward of ``model``'s decoder inside the block these keywords (``observer``, ``selector``).

    Only ``cached_attention`` uses them: run the model through ``continue_from``, ``prefill`` or under
    ``attention_implementation(model, CACHED)``. A keyword passed to a forward directly takes precedence.
    """

    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, attention | kwargs

    hook = decoder_of(model).register_forward_pre_hook(add, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
