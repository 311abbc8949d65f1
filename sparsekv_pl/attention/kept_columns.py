"""Causal attention in which each KV head sees its kept keys, the recent window and the query itself.

Query i attends to key j exactly if ``j <= i``, j is not padding, and ``i - j < recent`` or j is in the kept
set of its KV head (anchors are in every kept set). ``kept_columns_mask`` implements this rule as a dense mask;
the fast paths go through chunks of queries, gather only the visible columns and must equal it in values and
gradients.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sparsekv_pl.models.devices import sent

Backend = Literal["cpu_flash", "sdpa"]


class _Span(NamedTuple):
    """A chunk of queries start..stop, and its columns: ``old`` gathered ones, then the block first..stop."""

    start: int
    stop: int
    first: int
    old: int


@dataclass(frozen=True)
class _Walk:
    """The walk over query chunks: ``kept`` (B, K, M), ``real`` (B, S) bool, False on padding."""

    kept: Tensor
    real: Tensor
    recent: int
    spans: list[_Span]

    def is_kept(self) -> Tensor:
        """Return (B, K, S) bool, True for kept keys."""
        length = self.real.shape[1]
        member = self.kept.new_zeros((*self.kept.shape[:2], length + 1), dtype=torch.bool)
        return member.scatter_(2, self.kept, True)[..., :length]

    def gathered(self) -> Tensor:
        """Return positions (B, K, M) that are safe to gather: a filler reads the last key, which the mask hides."""
        return self.kept.clamp(max=self.real.shape[1] - 1)

    def visible(self, span: _Span, is_kept: Tensor) -> Tensor:
        """Return the chunk's mask (B, K, stop - start, old + stop - first) bool, True where visible."""
        real_kept = self.real[:, None].expand(-1, self.kept.shape[1], -1).gather(2, self.gathered())
        old = ((self.kept < span.first) & real_kept)[:, :, None, : span.old]
        block = slice(span.first, span.stop)
        position = torch.arange(span.stop, device=self.kept.device)
        distance = position[span.start :, None] - position[block]
        near = (distance < self.recent) | is_kept[:, :, None, block]
        near = near & (distance >= 0) & self.real[:, None, None, block]
        return torch.cat([old.expand(-1, -1, span.stop - span.start, -1), near], dim=-1)


def _spans(kept: Tensor, length: int, recent: int, query_chunk: int) -> list[_Span]:
    """Cut ``length`` queries into chunks; ``kept`` (B, K, M) is best on the host, where it was drawn."""
    starts = torch.arange(0, length, query_chunk, device=kept.device)
    firsts = (starts - recent + 1).clamp(min=0)
    # kept is sorted, so the keys before the block are a prefix; the longest over rows and heads serves all.
    per_head = torch.searchsorted(kept, firsts.expand(*kept.shape[:2], -1).contiguous())
    return [
        _Span(start, min(start + query_chunk, length), first, old)
        for start, first, old in zip(starts.tolist(), firsts.tolist(), per_head.amax((0, 1)).tolist(), strict=True)
    ]


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Gather positions (B, K, M) of ``states`` (B, K, S, D): (B, K, M, D)."""
    return states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[-1]))


def _columns(states: Tensor, kept_states: Tensor, span: _Span) -> Tensor:
    """Return the chunk's keys or values (B, K, old + stop - first, D)."""
    return torch.cat([kept_states[:, :, : span.old], states[:, :, span.first : span.stop]], dim=2)


def _fold(states: Tensor, span: _Span, kv_heads: int) -> Tensor:
    """Reshape a chunk of (B, H, S, D) to (B, K, H / K * chunk, D), so that no key is repeated."""
    chunk = states[:, :, span.start : span.stop]
    return chunk.reshape(chunk.shape[0], kv_heads, -1, chunk.shape[-1])


def _float_mask(visible: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Convert a mask (B, K, C, W) bool to an additive one (B, K, groups * C, W) of ``dtype``, rows as in ``_fold``."""
    mask = visible.new_zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)


class _CPUFlash(torch.autograd.Function):
    """Run aten's CPU flash kernels chunk by chunk; saves O(S): inputs, output, logsumexp, kept indices.

    The kernels read the mask as float32 for half-precision inputs and as the inputs' own type otherwise.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, walk: _Walk, scale: float) -> Tensor:
        (batch, heads, length, dim), kv_heads = query.shape, key.shape[1]
        groups = heads // kv_heads
        out = query.new_empty(batch, length, heads, dim)
        lse = query.new_empty(batch, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))
        is_kept, index = walk.is_kept(), walk.gathered()
        kept_key, kept_value = _gather(key, index), _gather(value, index)
        for span in walk.spans:
            chunk_out, chunk_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _fold(query, span, kv_heads),
                _columns(key, kept_key, span),
                _columns(value, kept_value, span),
                attn_mask=_float_mask(walk.visible(span, is_kept), groups, lse.dtype),
                scale=scale,
            )
            queries = slice(span.start, span.stop)
            out[:, queries] = chunk_out.reshape(batch, heads, -1, dim).transpose(1, 2)
            lse[:, :, queries] = chunk_lse.reshape(batch, heads, -1)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.walk, ctx.scale = walk, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        walk: _Walk = ctx.walk
        (batch, heads, _, dim), kv_heads = query.shape, key.shape[1]
        is_kept, index = walk.is_kept(), walk.gathered()
        states = [(key, _gather(key, index)), (value, _gather(value, index))]
        # A key's gradient is a sum over chunks, so bfloat16 would lose what later chunks add.
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grads = [(torch.zeros_like(x, dtype=wide), torch.zeros_like(k, dtype=wide)) for x, k in states]
        grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
        for span in walk.spans:
            chunk_query, *chunk_states = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _fold(grad_out, span, kv_heads),
                _fold(query, span, kv_heads),
                *(_columns(x, k, span) for x, k in states),
                _fold(out, span, kv_heads),
                _fold(lse[..., None], span, kv_heads)[..., 0],
                0.0,
                False,
                attn_mask=_float_mask(walk.visible(span, is_kept), heads // kv_heads, lse.dtype),
                scale=ctx.scale,
            )
            grad_query[:, :, span.start : span.stop] = chunk_query.reshape(batch, heads, -1, dim)
            for (grad, grad_kept), chunk in zip(grads, chunk_states, strict=True):
                grad_kept[:, :, : span.old] += chunk[:, :, : span.old]
                grad[:, :, span.first : span.stop] += chunk[:, :, span.old :]
        index = index[..., None].expand(-1, -1, -1, dim)
        grad_key, grad_value = (grad.scatter_add_(2, index, kept).to(key.dtype) for grad, kept in grads)
        return grad_query, grad_key, grad_value, None, None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, walk: _Walk, scale: float) -> Tensor:
    """Compute the same chunks with PyTorch's own attention, on any device.

    Backward recomputes each chunk: keeping every chunk's columns and mask would be O(S^2).
    """
    (batch, heads, _, _), kv_heads = query.shape, key.shape[1]
    is_kept, index = walk.is_kept(), walk.gathered()
    kept_key, kept_value = _gather(key, index), _gather(value, index)

    def attend(span: _Span, query: Tensor, *states: Tensor) -> Tensor:
        key, kept_key, value, kept_value = states
        mask = walk.visible(span, is_kept).repeat(1, 1, heads // kv_heads, 1)
        columns = _columns(key, kept_key, span), _columns(value, kept_value, span)
        out = scaled_dot_product_attention(_fold(query, span, kv_heads), *columns, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, -1, value.shape[-1]).transpose(1, 2)

    states = (key, kept_key, value, kept_value)
    chunks = [checkpoint(attend, span, query, *states, use_reentrant=False) for span in walk.spans]
    return torch.cat(chunks, dim=1)


def kept_columns_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    recent: int,
    query_chunk: int,
    real: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attend to kept and recent keys, in O(S) memory and with work proportional to the kept keys.

    Returns (B, S, H, D); a query that may see no key gets zeros. Raises ``ValueError`` if ``recent`` or ``query_chunk``
    is below 1.

    Parameters
    ----------
    query, key, value
        (B, H, S, D), and twice (B, K, S, D), with H a multiple of K.
    kept
        (B, K, M) int64, positions of kept keys, sorted, with S as filler; best on the CPU.
    recent
        Most recent keys that every query sees, itself included, in tokens, at least 1.
    query_chunk
        Queries per call of the kernel, in tokens, at least 1.
    real
        (B, S) bool, False on padding; None for no padding.
    scale
        Factor of the dot products; None for D ** -0.5.
    backend
        None takes "cpu_flash" on a CPU if keys and values have the same width, else "sdpa".
    """
    for name, setting in (("recent", recent), ("query_chunk", query_chunk)):
        if setting < 1:
            raise ValueError(f"{name} is {setting}; it must be at least 1 token")
    if real is None:
        real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    if backend is None:
        flash = query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
        backend = "cpu_flash" if flash else "sdpa"
    spans = _spans(kept, query.shape[2], recent, query_chunk)
    walk = _Walk(sent(kept, query.device), real, recent, spans)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (_CPUFlash.apply if backend == "cpu_flash" else _sdpa)(query, key, value, walk, scale)


def kept_columns_mask(kept: Tensor, recent: int, real: Tensor) -> Tensor:
    """Return the rule as a mask (B, K, S, S) bool, True where query i sees key j: the slow reference."""
    length = real.shape[1]
    position = torch.arange(length, device=kept.device)
    distance = position[:, None] - position
    is_kept = (kept[..., None] == position).any(dim=2)
    return (distance >= 0) & ((distance < recent) | is_kept[:, :, None]) & real[:, None, None]
