"""Statistics of attention by layer and head, without an L x L matrix.

For each row and KV head, strips of queries are multiplied with tiles of keys (see online_softmax.py), and statistics of
the probabilities are summed. A tile's memory does not depend on the context's length or the number of heads; the
results grow linearly with L.
"""

from dataclasses import dataclass, fields, replace
from itertools import product
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekv_pl.attention.blocks import check_shapes
from sparsekv_pl.attention.online_softmax import BITS_PER_NAT, Strip, block_sums
from sparsekv_pl.models.softmax_rule import PLAIN, KnowsRules, SoftmaxRule


@dataclass(frozen=True)
class StatisticsSettings:
    """The settings of attention statistics. Raises ``ValueError`` for a setting out of range.

    Parameters
    ----------
    window
        Measure only the last ``window`` queries; null for all.
    top_k
        Number of keys per query whose attention is the top-k coverage.
    block_size
        Tokens per block of keys; blocks start at key 0 and the last one may be shorter.
    block_threshold
        A key block is empty for a query if it receives less than this share of the query's attention.
    query_block
        Queries whose attention is averaged before it is compared with the threshold, as in block-sparse attention;
        1 compares every query. Blocks start at the first observed query.
    query_tile, key_tile
        Largest tile computed at once, in tokens; rounded up to whole blocks. With fewer keys a tile has more queries,
        so that its size stays the same. They bound the memory (H / K * query_tile * key_tile floats, up to four times)
        and do not change results.
    """

    window: int | None = None
    top_k: int = 64
    block_size: int = 64
    block_threshold: float = 0.01
    query_block: int = 1
    query_tile: int = 32
    key_tile: int = 8192

    def __post_init__(self) -> None:
        for name in ("window", "top_k", "block_size", "query_block", "query_tile", "key_tile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 < self.block_threshold <= 1:
            raise ValueError(f"block_threshold={self.block_threshold} must be in (0, 1]: it is a share of attention")


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's attention: B rows, H query heads, S keys, the W last queries; all float32."""

    received: Tensor
    """(B, H, S), attention that each key receives, summed over the queries."""
    entropy: Tensor
    """(B, H, W), entropy of each query's attention, in nats."""
    top_k_coverage: Tensor
    """(B, H, W), share of a query's attention on the ``top_k`` keys that get most of it; 1 if it sees no more."""
    block_sparsity: Tensor
    """(B, H, W), share of the key blocks visible to a query (or its query block) that are empty for it."""
    token_share: Tensor | None
    """(B, H, W), share of a query's attention on the given tokens; None if none were given."""

    @property
    def effective_support(self) -> Tensor:
        """(B, H, W), exp(entropy): the number of keys over which uniform attention would have the same entropy."""
        return self.entropy.exp()

    def mean(self, per_query: Tensor) -> Tensor:
        """Average (B, H, W) over the queries, (B, H)."""
        return per_query.sum(-1) / per_query.shape[-1]

    def followed_by(self, later: "LayerStatistics") -> "LayerStatistics":
        """Join with the statistics of the queries right after these, over these keys and more."""
        grown = later.received.shape[-1] - self.received.shape[-1]
        assert grown == later.entropy.shape[-1], "queries are missing between the two"
        per_query = {
            field.name: torch.cat([getattr(self, field.name), getattr(later, field.name)], dim=-1)
            for field in fields(self)
            if field.name != "received" and getattr(self, field.name) is not None
        }
        return replace(later, received=pad(self.received, (0, grown)) + later.received, **per_query)

    def received_by_block(self, block_size: int) -> Tensor:
        """Sum ``received`` over blocks of ``block_size`` keys, the last of which may be shorter: (B, H, blocks)."""
        return block_sums(self.received, block_size)


class AttentionStatistics(KnowsRules):
    """An ``Observer`` (evicted_attention.py) of the attention statistics of one full-cache pass, also in chunks.

    Pass it as ``observer=`` to a forward with this project's attention, for example
    ``continue_from(model, ids, DynamicCache(), 0, observer=statistics)``; then ``statistics.layers[layer]`` is that
    layer's ``LayerStatistics``. Chunks of a pass are joined; a window must lie in the last one. Each pass needs its own
    observer.

    ``tokens`` (B, S) bool is the token set whose share is measured (anchors), or None.
    """

    def __init__(self, settings: StatisticsSettings | None = None, tokens: Tensor | None = None) -> None:
        self.settings, self.tokens = settings or StatisticsSettings(), tokens
        self.layers: dict[int, LayerStatistics] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: SoftmaxRule = PLAIN) -> None:  # noqa: ARG002
        """Measure one layer: ``query`` (B, H, T, D) has the last T of the S positions of ``key`` (B, K, S, D).

        Raises ``ValueError`` if this layer was measured before and these queries are not the next ones, or if a window
        or a query block would reach into an earlier chunk.
        """
        queries, seen = query.shape[2], key.shape[2]
        before = self.layers.get(layer)
        if before is not None:
            self._check_following(layer, before, queries, seen)
        tokens = None if self.tokens is None else self.tokens[:, :seen].to(key.device)
        measured = attention_statistics(query, key, self.settings, tokens=tokens, rule=rule)
        if before is not None and self.settings.window is None:
            measured = before.followed_by(measured)
        self.layers[layer] = measured

    def _check_following(self, layer: int, before: LayerStatistics, queries: int, seen: int) -> None:
        window, block = self.settings.window, self.settings.query_block
        if before.received.shape[-1] != seen - queries:
            raise ValueError(
                f"layer {layer} was measured already, up to key {before.received.shape[-1]}, and these {queries} "
                f"queries end at key {seen}: take a new AttentionStatistics for every pass"
            )
        if window is not None and queries < window:
            raise ValueError(f"window={window} is longer than a chunk of {queries} tokens: use longer chunks")
        if window is None and before.entropy.shape[-1] % block:
            raise ValueError(f"chunks must be whole query blocks: use a multiple of query_block={block} tokens")


@torch.no_grad()
def attention_statistics(
    query: Tensor,
    key: Tensor,
    settings: StatisticsSettings | None = None,
    *,
    tokens: Tensor | None = None,
    rule: SoftmaxRule = PLAIN,
) -> LayerStatistics:
    """Compute statistics of softmax(query key^T / sqrt(D)) under ``rule``, causal, in float32.

    ``query`` (B, H, T, D) has the last T of the S positions of ``key`` (B, K, S, D), any dtype, H a multiple of K; the
    query heads of a group are neighbours. ``tokens`` are those of ``AttentionStatistics``. Raises ``ValueError`` if
    shapes do not fit one another.
    """
    settings = settings or StatisticsSettings()
    check_shapes(query, key)
    (batch, heads, queries, dim), (kv_heads, seen) = query.shape, key.shape[1:3]
    if tokens is not None and tokens.shape != (batch, seen):
        raise ValueError(f"tokens has shape {tuple(tokens.shape)} but there are {(batch, seen)} rows and keys")
    observed, scaling = min(queries, settings.window or queries), dim**-0.5
    received = torch.zeros(batch, heads, seen, device=key.device)
    per_query = torch.zeros(4, batch, heads, observed, device=key.device)
    with torch.autocast(query.device.type, enabled=False):  # it would round the products to 16 bits
        for row, kv_head in product(range(batch), range(kv_heads)):
            group = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            keys, own = key[row, kv_head].float(), query[row, group, queries - observed :]
            marked = None if tokens is None else tokens[row].float()
            ruled = rule if rule.sinks is None else rule._replace(sinks=rule.sinks[group])
            _measure_group(own, keys, marked, scaling, ruled, settings, received[row, group], per_query[:, row, group])
    entropy, coverage, sparsity, share = per_query
    return LayerStatistics(received, entropy, coverage, sparsity, None if tokens is None else share)


def _measure_group(
    query: Tensor,
    keys: Tensor,
    tokens: Tensor | None,
    scaling: float,
    rule: SoftmaxRule,
    settings: StatisticsSettings,
    received: Tensor,
    per_query: Tensor,
) -> None:
    """Fill ``received`` (G, S) and ``per_query`` (4, G, W) for queries (G, W, D) at the last W of S positions."""
    (observed, seen), block = (query.shape[1], len(keys)), settings.query_block
    key_step = min(_whole_blocks(settings.key_tile, settings.block_size), seen)
    step = _whole_blocks(max(settings.query_tile * settings.key_tile // key_step, 1), block)
    for start in range(0, observed, step):
        strip = Strip(query[:, start : start + step], keys, seen - observed + start, scaling, rule)
        per_query[..., start : start + step] = _measure(strip, tokens, settings, received)


def _measure(strip: Strip, tokens: Tensor | None, settings: StatisticsSettings, received: Tensor) -> Tensor:
    """Return entropy, coverage, sparsity and share of a strip, (4, G, Q), and add to ``received`` (G, S)."""
    step = _whole_blocks(settings.key_tile, settings.block_size)
    entropy, share, empty, blocks = strip.query.new_zeros(4, *strip.query.shape[:2])
    top = strip.query.new_zeros(*entropy.shape, 0)
    for tile, log_scale in strip.tiles(step, settings.block_size):
        here, scale = slice(tile.start, tile.stop), log_scale.exp2()
        received[:, here] += (scale.unsqueeze(1) @ tile.weights).squeeze(1)
        if tokens is not None:
            share += tile.weights @ tokens[here] * scale
        top = torch.cat([top, _largest(tile.weights, settings.top_k) * scale.unsqueeze(-1)], dim=-1)
        top = _largest(top, settings.top_k)
        first = torch.arange(tile.start, tile.stop, settings.block_size, device=scale.device)
        empty_here, blocks_here = _count_blocks(strip, tile.block_mass * scale.unsqueeze(-1), first, settings)
        empty += empty_here
        blocks += blocks_here
        entropy -= (tile.logits.mul_(tile.weights).sum(-1) + tile.block_mass.sum(-1) * log_scale) * scale
    return torch.stack([entropy / BITS_PER_NAT, top.sum(-1), empty / blocks, share])


def _count_blocks(strip: Strip, mass: Tensor, first: Tensor, settings: StatisticsSettings) -> tuple[Tensor, Tensor]:
    """Count the empty key blocks of a tile, (G, Q), and the visible ones, (Q,).

    ``mass`` (G, Q, blocks) is the attention that they receive, ``first`` (blocks,) the first position that sees them.
    """
    seen, group = first <= strip.positions[:, None], settings.query_block
    if group > 1:
        queries = block_sums(torch.ones_like(strip.positions).float(), group)
        mass = block_sums(mass.mT, group).mT / queries[:, None]
        seen = block_sums(seen.float().mT, group).mT > 0
    empty = ((mass < settings.block_threshold) & seen).sum(-1)
    if group == 1:
        return empty, seen.sum(-1)
    every_query = [count.repeat_interleave(group, -1)[..., : len(strip.positions)] for count in (empty, seen.sum(-1))]
    return every_query[0], every_query[1]


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest of (..., n), or all if there are fewer, in any order.

    The largest values lie in the parts with the largest maxima: only those parts are searched, which is several times
    faster than the whole row.
    """
    total = values.shape[-1]
    if total <= count:
        return values
    size = isqrt(total // count)
    if size < 2:
        return values.topk(count, sorted=False).values
    parts = total // size
    body = values[..., : size * parts].unflatten(-1, (size, parts))  # strided: a part is a column of (size, parts)
    best = body.amax(-2).topk(count, sorted=False).indices
    found = body.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], size, count)).flatten(-2)
    return torch.cat([found, values[..., size * parts :]], dim=-1).topk(count, sorted=False).values


def _whole_blocks(tokens: int, block: int) -> int:
    return -(-tokens // block) * block
