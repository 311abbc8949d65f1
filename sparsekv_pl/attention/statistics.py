"""What attention looks like, by layer and head, without ever holding an L x L matrix.

Queries are taken in strips and keys in tiles. The first walk over a strip's tiles keeps a running log-sum-exp of every
query; the second turns the tiles, computed again, into true probabilities and adds up what is asked of them. The memory
for a tile is the same however long the context is, and what is returned grows with L alone. Tiles that no query of a
strip can see are never computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

ZERO = -200.0
"""A log-probability whose exponential is 0 in float32; finite, so that 0 * log 0 is 0 and not NaN."""


@dataclass(frozen=True)
class StatisticsSettings:
    """What to measure.

    Parameters
    ----------
    window
        Look at the last ``window`` queries alone; null for all.
    top_k
        Keys per query whose mass is the top-k coverage.
    block_size
        Keys per block, in tokens; blocks start at key 0 and the last one may be shorter.
    block_threshold
        A key block is empty for a query if it receives less than this share of its attention.
    query_block
        Queries that share one verdict on key blocks, as in block-sparse attention: their attention is averaged before
        it is compared with the threshold. 1 judges every query by itself. Blocks start at the first observed query.
    query_tile, key_tile
        Largest tile computed at once, in tokens; rounded up to whole blocks. They bound the memory (B * H * query_tile
        * key_tile floats, about three times) and change no result.
    """

    window: int | None = None
    top_k: int = 64
    block_size: int = 64
    block_threshold: float = 0.01
    query_block: int = 1
    query_tile: int = 64
    key_tile: int = 4096

    def __post_init__(self) -> None:
        for name in ("window", "top_k", "block_size", "query_block", "query_tile", "key_tile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 < self.block_threshold <= 1:
            raise ValueError(f"block_threshold={self.block_threshold} must be in (0, 1]: it is a share of attention")


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's attention. B rows, H query heads, S keys, W observed queries (the last W); all float32."""

    received: Tensor
    """(B, H, S), attention that each key receives, summed over the counted queries."""
    entropy: Tensor
    """(B, H, W), nats."""
    top_k_coverage: Tensor
    """(B, H, W), share of a query's attention on its ``top_k`` heaviest keys; 1 where it sees no more than that."""
    block_sparsity: Tensor
    """(B, H, W), of the key blocks that a query (or its query block) can see, the share that is empty for it."""
    token_share: Tensor | None
    """(B, H, W), share of a query's attention on the given tokens; None where none were given."""
    counted: Tensor
    """(B, W) bool, False for queries that are padding: they hold 0 everywhere and enter no mean."""

    @property
    def effective_support(self) -> Tensor:
        """(B, H, W), exp(entropy): the number of keys that equal attention would be spread over."""
        return torch.where(self.counted[:, None], self.entropy.exp(), 0)

    def mean(self, per_query: Tensor) -> Tensor:
        """(B, H): (B, H, W) averaged over the counted queries; NaN for a row that has none."""
        return per_query.sum(-1) / self.counted.sum(-1)[:, None]

    def received_by_block(self, block_size: int) -> Tensor:
        """(B, H, blocks): ``received`` summed over blocks of ``block_size`` keys, the last one may be shorter."""
        return _by_block(self.received, block_size).sum(-1)


class AttentionStatistics:
    """An observer (see attention/cached.py) that measures every layer of one full-cache pass.

    Give it as ``observer=`` to a forward that runs with our attention, for instance
    ``continue_from(model, ids, DynamicCache(), 0, observer=statistics)``; then ``statistics.layers[layer]`` is that
    layer's ``LayerStatistics``. A second pass needs a second observer.

    Parameters
    ----------
    settings
        What to measure.
    tokens
        (B, S) bool, the token set whose share is measured (anchors), or None.
    valid
        (B, S) bool, False for padding, or None.
    scaling
        Factor of the dot products; None for 1 / sqrt(D), which all Llama-like models use.
    """

    def __init__(
        self,
        settings: StatisticsSettings | None = None,
        tokens: Tensor | None = None,
        valid: Tensor | None = None,
        scaling: float | None = None,
    ) -> None:
        self.settings = settings or StatisticsSettings()
        self.tokens, self.valid, self.scaling = tokens, valid, scaling
        self.layers: dict[int, LayerStatistics] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        """Measure one layer: ``query`` (B, H, T, D) are the last T positions of the S that ``key`` (B, K, S, D) holds.

        Raises
        ------
        ValueError
            If this layer was measured before.
        """
        if layer in self.layers:
            raise ValueError(
                f"layer {layer} was measured already: take a new AttentionStatistics for every pass, and in a chunked "
                "prefill observe the last chunk alone"
            )
        self.layers[layer] = attention_statistics(
            query, key, self.settings, tokens=self.tokens, valid=self.valid, scaling=self.scaling
        )


@torch.no_grad()
def attention_statistics(
    query: Tensor,
    key: Tensor,
    settings: StatisticsSettings | None = None,
    *,
    tokens: Tensor | None = None,
    valid: Tensor | None = None,
    scaling: float | None = None,
) -> LayerStatistics:
    """Statistics of softmax(query key^T * scaling), causal from the lower right, computed in float32.

    ``query`` (B, H, T, D) are the last T of the S positions of ``key`` (B, K, S, D), any dtype, H a multiple of K; the
    query heads of a group are neighbours. ``tokens``, ``valid`` and ``scaling`` are those of ``AttentionStatistics``.

    Raises
    ------
    ValueError
        For shapes that do not fit one another.
    """
    settings = settings or StatisticsSettings()
    _check(query, key, {"tokens": tokens, "valid": valid})
    batch, heads, queries, dim = query.shape
    seen = key.shape[2]
    observed = min(queries, settings.window or queries)
    step = _whole_blocks(settings.query_tile, settings.query_block)
    received = torch.zeros(batch, heads, seen, device=key.device)
    scaled = scaling if scaling is not None else dim**-0.5
    parts = []
    with torch.autocast(query.device.type, enabled=False):  # it would round the products to 16 bits
        for start in range(queries - observed, queries, step):
            strip = _Strip(query[:, :, start : start + step].float() * scaled, key, seen - queries + start, valid)
            parts.append(_measure(strip, settings, received, tokens))
    entropy, coverage, sparsity, share = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    counted = torch.ones(batch, seen, dtype=torch.bool, device=key.device) if valid is None else valid.bool()
    return LayerStatistics(
        received, entropy, coverage, sparsity, None if tokens is None else share, counted[:, seen - observed :]
    )


class _Strip:
    """Consecutive queries (B, H, Q, D), float32 and scaled, the first at ``position``, against tiles of the keys."""

    def __init__(self, query: Tensor, key: Tensor, position: int, valid: Tensor | None) -> None:
        self.batch, self.heads, self.queries, dim = query.shape
        self.query = query.reshape(self.batch, key.shape[1], -1, dim)  # (B, K, heads of a group * Q, D)
        self.key = key
        self.valid = None if valid is None else valid.bool()
        self.positions = torch.arange(position, position + self.queries, device=query.device)
        self.seen = position + self.queries
        self.counted = torch.ones(1, 1, self.queries, device=query.device)
        if self.valid is not None:
            self.counted = self.valid[:, None, self.positions].float()

    def tiles(self, step: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the tiles that some query sees."""
        return ((start, min(start + step, self.seen)) for start in range(0, self.seen, step))

    def visible(self, start: int, stop: int) -> Tensor:
        """(B or 1, 1, Q, keys) bool; nothing is visible to a query that is padding."""
        keys = torch.arange(start, stop, device=self.positions.device)
        causal = (keys <= self.positions[:, None])[None, None]
        if self.valid is None:
            return causal
        return causal & self.valid[:, None, None, start:stop] & self.valid[:, None, self.positions, None]

    def logits(self, start: int, stop: int) -> Tensor:
        """(B, H, Q, keys), -inf where not visible."""
        products = self.query @ self.key[:, :, start:stop].float().transpose(2, 3)
        logits = products.view(self.batch, self.heads, self.queries, stop - start)
        if self.valid is None and stop <= self.positions[0]:
            return logits
        return logits.masked_fill_(~self.visible(start, stop), -torch.inf)

    def normaliser(self, step: int) -> Tensor:
        """(B, H, Q, 1), the log-sum-exp of each query over all its keys; 0 where it sees none."""
        total = self.query.new_full((self.batch, self.heads, self.queries), -torch.inf)
        for start, stop in self.tiles(step):
            total = torch.logaddexp(total, self.logits(start, stop).logsumexp(-1))
        return total.masked_fill_(total == -torch.inf, 0).unsqueeze(-1)


def _measure(
    strip: _Strip, settings: StatisticsSettings, received: Tensor, tokens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, coverage, sparsity, share, each (B, H, Q), of a strip; adds to ``received`` (B, H, S)."""
    step = _whole_blocks(settings.key_tile, settings.block_size)
    normaliser = strip.normaliser(step)
    entropy, share, empty, blocks = (torch.zeros_like(normaliser[..., 0]) for _ in range(4))
    top = normaliser.new_zeros(*entropy.shape, 0)
    for start, stop in strip.tiles(step):
        log_p = strip.logits(start, stop).sub_(normaliser).clamp_(min=ZERO)
        p = log_p.exp()
        entropy -= log_p.mul_(p).sum(-1)
        received[..., start:stop] += p.sum(2)
        if tokens is not None:
            share += (p @ tokens[:, None, start:stop, None].float()).squeeze(-1)
        top = torch.cat([top, p.topk(min(settings.top_k, stop - start), sorted=False).values], dim=-1)
        top = top.topk(min(settings.top_k, top.shape[-1]), sorted=False).values
        empty_here, blocks_here = _count_blocks(strip, p, strip.visible(start, stop), settings)
        empty += empty_here
        blocks += blocks_here
    return entropy, top.sum(-1), empty / blocks.clamp(min=1) * strip.counted, share


def _count_blocks(strip: _Strip, p: Tensor, visible: Tensor, settings: StatisticsSettings) -> tuple[Tensor, Tensor]:
    """How many key blocks of a tile are empty, (B, H, Q), and how many are visible at all, (B or 1, 1, Q)."""
    seen = _by_block(visible, settings.block_size).any(-1)
    mass = _by_block(p, settings.block_size).sum(-1)
    group = settings.query_block
    if group > 1:
        counted = _by_block(strip.counted, group).sum(-1).clamp(min=1)
        mass = _by_block(mass.transpose(2, 3), group).sum(-1).transpose(2, 3) / counted[..., None]
        seen = _by_block(seen.transpose(2, 3), group).any(-1).transpose(2, 3)
    empty = ((mass < settings.block_threshold) & seen).sum(-1)
    every_query = [count.repeat_interleave(group, -1)[..., : strip.queries] for count in (empty, seen.sum(-1))]
    return every_query[0], every_query[1]


def _by_block(values: Tensor, block_size: int) -> Tensor:
    """(..., S) -> (..., blocks, block_size), filled up with 0 (False)."""
    return pad(values, (0, -values.shape[-1] % block_size)).unflatten(-1, (-1, block_size))


def _whole_blocks(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _check(query: Tensor, key: Tensor, masks: dict[str, Tensor | None]) -> None:
    (batch, heads, queries, dim), (rows, kv_heads, seen, key_dim) = query.shape, key.shape
    if batch != rows or dim != key_dim or heads % kv_heads or not 0 < queries <= seen:
        raise ValueError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not fit: give (B, H, T, D) and (B, K, S, D) "
            "with H a multiple of K and the queries the last T of the S positions"
        )
    for name, mask in masks.items():
        if mask is not None and mask.shape != (batch, seen):
            raise ValueError(f"{name} has shape {tuple(mask.shape)} but there are {(batch, seen)} rows and keys")
