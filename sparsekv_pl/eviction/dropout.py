"""KV dropout: one teacher-forced pass in which every layer and KV head has its own random set of kept keys.

Every query still sees itself, its own recent window and the anchors. Unlike real eviction it trains the
context's queries under eviction too, and needs no cache. Layers with a sliding window drop nothing, if others have full
attention.

The attention of ``attention/kept_columns.py`` is registered under ``NAME`` with transformers' attention and mask
interfaces; without the mask interface, padding would be ignored. The kept keys are passed as the keyword argument
``kept_columns`` of the model's forward, so no module or global holds them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.kept_columns import kept_columns_attention
from sparsekv_pl.eviction.interface import Evicted
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.anchors import Anchors, AnchorTable
from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import evicted_layers, window_of, windowed_alone, windows
from sparsekv_pl.models.seeding import generator_for
from sparsekv_pl.presses.step_draws import row_numbers

NAME = "sparsekv_kept_columns"
"""The name under which transformers finds this attention."""


@dataclass(frozen=True)
class KeptColumns:
    """The keys that attention may see in one forward pass.

    ``draw(layer_idx, kv_heads)`` returns that layer's kept keys, (B, K, M) int64, sorted, with S as filler
    where a row keeps fewer than M. A checkpointed layer calls it again to recompute, so it must depend on nothing
    but its arguments. ``recent`` counts the query itself. ``recent`` and ``query_chunk`` are in tokens, >= 1.
    """

    draw: Callable[[int, int], Tensor]
    recent: int
    query_chunk: int


@dataclass
class KVDropout:
    """Evict at random, by layer and KV head, in one pass.

    Parameters
    ----------
    anchors
        Tokens that are never dropped. ``anchors.recent`` is also the window, in tokens, of each query's own most
        recent keys.
    seed
        Seeds every draw, together with the step, the layer and the row's context.
    query_chunk
        Queries per call of the attention kernel, in tokens; more means fewer calls and more memory.
    checkpoint
        Keep no activations inside layers: backward runs each layer again, so only one layer's activations exist at a
        time (https://arxiv.org/abs/1604.06174). Costs a second forward.
    """

    anchors: Anchors = field(default_factory=Anchors)
    seed: int = 0
    query_chunk: int = 128
    checkpoint: bool = False
    tokenizer: PreTrainedTokenizerBase | AnchorTable | None = field(default=None, init=False, repr=False, compare=False)
    """Identifies special tokens and punctuation for the anchors; set it before the first pass."""
    press = None  # kept keys are random

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        if self.query_chunk < 1:
            raise ValueError(f"query_chunk={self.query_chunk} must be at least 1 token")

    def check(self, context_tokens: int, request: Request = NOTHING) -> None:
        """Raise ``ValueError`` if a context of ``context_tokens`` tokens consists of anchors alone."""
        assert not (request.scores or request.contexts or request.press_losses)  # see fit_together
        self.anchors.check(context_tokens)

    def later_evictions(
        self,
        context_tokens: int,  # noqa: ARG002
        continuation_tokens: int,  # noqa: ARG002
        turn_ends: Sequence[int] = (),  # noqa: ARG002
    ) -> Sequence[int]:
        """Return nothing: continuation tokens come after the eviction and are never dropped."""
        return ()

    def __call__(
        self,
        model: PreTrainedModel,
        context_ids: Tensor,
        continuation_ids: Tensor,
        *,
        compression_ratio: float,
        step: int,
        request: Request = NOTHING,
        turn_ends: Sequence[int] = (),  # noqa: ARG002
    ) -> Evicted:
        """Run context and continuation in one pass; see ``Eviction``.

        ``compression_ratio`` is the share of the evictable context (all but anchors) that every KV head loses.
        Continuation tokens come after the eviction and are never dropped.
        """
        check_compression_ratio("compression_ratio", compression_ratio)
        if self.tokenizer is None:
            raise ValueError("KVDropout has no tokenizer to find anchors with: set its tokenizer first")
        context_tokens = context_ids.shape[1]
        self.check(context_tokens, request)
        _check_windows(model, context_tokens + continuation_ids.shape[1])
        anchors = self.anchors.mask(context_ids, self.tokenizer).cpu()
        always = torch.cat([anchors, anchors.new_ones(continuation_ids.shape)], dim=1)
        removed = removed_tokens(always, compression_ratio)
        columns = KeptColumns(
            draw=partial(draw_kept, always, removed, [(self.seed, step, row) for row in row_numbers(context_ids)]),
            recent=max(1, self.anchors.recent),
            query_chunk=self.query_chunk,
        )
        with _checkpointed(model) if self.checkpoint else nullcontext(), _kept_columns_in(model):
            hidden = decoder_of(model)(
                input_ids=torch.cat([context_ids, continuation_ids], dim=1),
                use_cache=False,
                kept_columns=columns,
            ).last_hidden_state
        kept_share = 1 - float(removed.double().mean()) / context_tokens
        return Evicted(hidden[:, context_tokens:], kept_share)


def _check_windows(model: PreTrainedModel, tokens: int) -> None:
    """Raise ``ValueError`` if ``tokens`` tokens leave a window that KV dropout cannot keep."""
    alone = windowed_alone(model.config)
    chunks = min((each.tokens for each in windows(model.config) if each is not None and each.chunked), default=None)
    for size, what in ((alone, "every layer has a local window"), (chunks, "layers attend within chunks")):
        if size is not None and tokens > size:
            raise ValueError(
                f"KV dropout drops in layers with full attention beside sliding windows, and in this model {what} "
                f"({size}), which {tokens} tokens leave: use shorter ones, or real eviction"
            )


def removed_tokens(always: Tensor, compression_ratio: float) -> Tensor:
    """Number of keys that each row loses in every layer and head, (B,) int64. ``always`` (B, S) bool: never lost."""
    return ((~always).sum(dim=1).double() * compression_ratio).round().long()


def draw_kept(
    always: Tensor, removed: Tensor, seeds: Sequence[tuple[int, ...]], layer_idx: int, kv_heads: int
) -> Tensor:
    """Draw one layer's kept keys, (B, K, M) int64, sorted; rows that keep fewer than M end in S as filler.

    ``always`` (B, S) bool and ``removed`` (B,) int64 are on the CPU, ``seeds`` has one entry per row. Every head of a
    row keeps the same number. The draw happens on the CPU, so it is the same on every device. A longer row starts with
    the same draws as a shorter one, so padding at the end changes no draw.
    """
    length = always.shape[1]
    generators = [generator_for("kept keys", *seed, layer_idx) for seed in seeds]
    draws = [torch.rand(length, kv_heads, generator=generator).T for generator in generators]
    rank_by = torch.stack(draws)
    rank_by.masked_fill_(always[:, None], -1.0)
    kept = length - removed[:, None, None]
    most = int(kept.max())
    chosen = rank_by.argsort(dim=-1)[..., :most]
    return chosen.masked_fill_(torch.arange(most) >= kept, length).sort(dim=-1).values


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Checkpoint every layer inside the block only: checkpointed layers ignore a cache, which other passes need."""
    already = model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    try:
        yield
    finally:
        if not already:
            model.gradient_checkpointing_disable()


@contextmanager
def _kept_columns_in(model: PreTrainedModel) -> Iterator[None]:
    """Compute ``model``'s attention over kept columns inside the block.

    Checkpointed layers run again in the backward pass, after the block; the same attention is set for that. This needs
    non-reentrant checkpointing, transformers' default.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), attention_implementation(model, NAME)

    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [module._gradient_checkpointing_func for module in checkpointed]
    for module, function in zip(checkpointed, functions, strict=True):
        module._gradient_checkpointing_func = partial(function, context_fn=contexts)
    try:
        with attention_implementation(model, NAME):
            yield
    finally:
        for module, function in zip(checkpointed, functions, strict=True):
            module._gradient_checkpointing_func = function


def _padding_mask(
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_: Any,
) -> Tensor | None:
    """Make the mask that transformers passes to ``_registered_attention``: (B, S) bool or None, never S x S."""
    if local_size is None and mask_function is not causal_mask_function:
        raise ValueError(
            f"KV dropout needs plain causal attention over all {kv_length} tokens, but this model asks for packed "
            "sequences: use unpacked ones, or real eviction"
        )
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"KV dropout needs a padding mask of shape {(batch_size, kv_length)}, got "
            f"{tuple(attention_mask.shape)}: pass one token per column and no cache"
        )
    return attention_mask


def _registered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    kept_columns: KeptColumns | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with transformers' attention signature; return (B, S, H, D) and no attention weights."""
    if kept_columns is None:
        raise ValueError(f"Attention {NAME!r} needs model(..., kept_columns=KeptColumns(...))")
    asked = {"dropout": dropout or None, "softcap": kwargs.get("softcap"), "s_aux": kwargs.get("s_aux")}
    if unsupported := {name: setting for name, setting in asked.items() if setting is not None}:
        raise ValueError(f"KV dropout does not support {unsupported}: switch it off, or use real eviction")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"{type(module).__name__} weighs keys by a mask of its own: choose a model without")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"KV dropout is one pass, but got {query.shape[2]} queries and {key.shape[2]} keys: pass use_cache=False"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for PyTorch's own attention: rotary embeddings leave queries and keys in float32.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    kept, recent = _visible(module, key, kept_columns)
    out = kept_columns_attention(
        query,
        key,
        value,
        kept,
        recent=recent,
        query_chunk=kept_columns.query_chunk,
        real=attention_mask,
        scale=scaling,
    )
    return out, None


def _visible(module: nn.Module, key: Tensor, columns: KeptColumns) -> tuple[Tensor, int]:
    """Return a layer's kept keys (B, K, M) and its recent window; a sliding window keeps no others."""
    layer, config, (batch, kv_heads, length, _) = int(module.layer_idx), module.config, key.shape  # type: ignore[arg-type]
    window = window_of(config, layer)  # type: ignore[arg-type]
    if window is None or layer in evicted_layers(config):  # type: ignore[arg-type]
        return columns.draw(layer, kv_heads), columns.recent
    return torch.full((batch, kv_heads, 1), length), window.tokens


AttentionInterface.register(NAME, _registered_attention)
AttentionMaskInterface.register(NAME, _padding_mask)
