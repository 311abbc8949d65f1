"""Measure the attention that keys receive: per key, and by group of keys and distance from the query.

Queries are processed in strips, each against all keys that it sees: memory grows with the context's length, not with
its square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sparsekv_pl.attention.blocks import check_shapes
from sparsekv_pl.attention.windows import lower_right_mask
from sparsekv_pl.models.softmax_rule import PLAIN, KnowsRules, SoftmaxRule

STRIP_QUERIES = 64
STRIP_FLOATS = 2**24
"""Limit of a strip's B * H * Q * S floats; it has at least one query and at most STRIP_QUERIES."""


@dataclass(frozen=True)
class Received:
    """Attention received, summed over queries. B rows, H heads, S keys, G groups, N bins of distance; all float32."""

    by_key: Tensor
    """(B, H, S), attention to each key."""
    by_group: Tensor
    """(B, H, G, N), by group and distance: bin n has distances from ``distance_edges(S)[n]`` to below the next edge."""


@dataclass(frozen=True)
class Exposure:
    """Counts of visible keys, independent of the model. Shapes as in ``Received``, without H."""

    pairs: Tensor
    """(B, G, N), number of pairs of a query and a key that it sees."""
    chance: Tensor
    """(B, G, N), attention received if each query spread it evenly over the keys it sees, summed over queries."""
    last: Tensor
    """(B, G, N), number of keys that the last query sees; they add up to S."""
    pairs_by_key: Tensor
    """(S,), number of queries that see a key."""
    chance_by_key: Tensor
    """(S,), ``chance`` per key."""


def distance_edges(keys: int) -> list[int]:
    """Return 0, 1, 2, 4, 8, ... up to the first that is not below ``keys``; distance 0 is the query's own token.

    >>> distance_edges(9)
    [0, 1, 2, 4, 8, 16]
    """
    edges = [0, 1]
    while edges[-1] < keys:
        edges.append(2 * edges[-1])
    return edges


class ReceivedAttention(KnowsRules):
    """An ``Observer`` (evicted_attention.py) of the attention that every layer's keys receive in one full-cache pass.

    Afterwards ``layers[layer]`` is that layer's ``Received``. Each pass needs its own observer. ``groups`` (B, S) int64
    are the keys' groups, from 0 to ``count`` - 1.
    """

    def __init__(self, groups: Tensor, count: int) -> None:
        self.groups, self.count = groups, count
        self.layers: dict[int, Received] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: SoftmaxRule = PLAIN) -> None:  # noqa: ARG002
        """Measure one layer. Raises ``ValueError`` if it was measured before."""
        if layer in self.layers:
            raise ValueError(f"layer {layer} was observed already: take a new ReceivedAttention for every pass")
        self.layers[layer] = received_attention(query, key, self.groups, self.count, rule)


@torch.no_grad()
def received_attention(query: Tensor, key: Tensor, groups: Tensor, count: int, rule: SoftmaxRule = PLAIN) -> Received:
    """Measure the attention that keys receive under softmax(query key^T / sqrt(D)) and ``rule``, causal, in float32.

    ``query`` (B, H, T, D) has the last T of the S positions of ``key`` (B, K, S, D), any dtype, H a multiple of K; the
    query heads of a group are neighbours. Rows are not padded. ``groups`` and ``count`` are those of
    ``ReceivedAttention``. Raises ``ValueError`` if shapes do not fit one another,
    or groups are not between 0 and ``count`` - 1.
    """
    (batch, heads, queries, dim), (kv_heads, seen) = query.shape, key.shape[1:3]
    check_shapes(query, key)
    if groups.shape != (batch, seen):
        raise ValueError(f"groups {tuple(groups.shape)} do not fit {seen} keys in {batch} rows: give (B, S)")
    members = _members(groups.to(key.device), count)
    total = _empty(batch, heads, seen, count, key.device)
    with torch.autocast(query.device.type, enabled=False):  # it would round the products to 16 bits
        grouped = query.float().reshape(batch, kv_heads, -1, queries, dim) * dim**-0.5
        keys = key.float().unsqueeze(2).transpose(3, 4)
        for start, stop in _strips(queries, batch * heads * seen):
            first, end = seen - queries + start, seen - queries + stop
            logits = (grouped[..., start:stop, :] @ keys[..., :end]).view(batch, heads, stop - start, end)
            logits = rule.logits(logits).masked_fill_(~lower_right_mask(end - first, end, key.device), -torch.inf)
            _add(rule.weights(logits), first, members, total)
    return total


def exposure(groups: Tensor, count: int) -> Exposure:
    """Count what queries at all S positions of ``groups`` (B, S) see of each of ``count`` groups, by distance."""
    (batch, seen), device = groups.shape, groups.device
    members = _members(groups, count)
    total = _empty(batch, 2, seen, count, device)
    last = _empty(batch, 1, seen, count, device)
    with torch.autocast(device.type, enabled=False):
        for first, end in _strips(seen, 2 * batch * seen):
            pairs = lower_right_mask(end - first, end, device).float()
            both = torch.stack([pairs, pairs / pairs.sum(-1, keepdim=True)])
            _add(both.expand(batch, -1, -1, -1), first, members, total)
        _add(torch.ones(batch, 1, 1, seen, dtype=torch.float32, device=device), seen - 1, members, last)
    (pairs, chance), (pairs_by_key, chance_by_key) = total.by_group.unbind(1), total.by_key[0]
    return Exposure(pairs, chance, last.by_group[:, 0], pairs_by_key, chance_by_key)


def carrying_share(by_key: Tensor, mass: float = 0.8) -> Tensor:
    """Return the smallest share (...) float64 of keys that receive ``mass`` of all attention ``by_key`` (..., S)."""
    heaviest = by_key.double().sort(dim=-1, descending=True).values.cumsum(-1)
    needed = (heaviest < mass * heaviest[..., -1:]).sum(-1) + 1
    return needed.double() / by_key.shape[-1]


def _add(attention: Tensor, first: int, members: Tensor, total: Received) -> None:
    """Add to ``total`` the attention (B, H, Q, N) of queries at positions ``first`` to N - 1 over the N keys so far."""
    end, device = attention.shape[-1], attention.device
    positions = torch.arange(first, end, device=device)[:, None]
    for place, (near, far) in enumerate(pairwise(distance_edges(total.by_key.shape[-1]))):
        start, stop = max(0, first - far + 1), end - near  # keys that are in this bin for a query of the strip
        if stop <= start:
            break
        distance = positions - torch.arange(start, stop, device=device)
        inside = (distance >= near) & (distance < far)
        mass = (attention[..., start:stop] * inside).sum(2)
        total.by_key[..., start:stop] += mass
        total.by_group[..., place] += mass @ members[:, start:stop]


def _strips(queries: int, floats: int) -> Iterator[tuple[int, int]]:
    """Return (start, stop) of strips of queries, each query taking ``floats`` floats."""
    step = max(1, min(STRIP_QUERIES, STRIP_FLOATS // floats))
    return ((start, min(start + step, queries)) for start in range(0, queries, step))


def _members(groups: Tensor, count: int) -> Tensor:
    """Return (B, S, G) float32, 1 if a key belongs to a group; ``ValueError`` for groups out of range."""
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise ValueError(f"groups go from {low} to {high}: give every key a group from 0 to {count - 1}")
    return one_hot(groups, count).float()


def _empty(batch: int, heads: int, keys: int, groups: int, device: torch.device) -> Received:
    # Not the default dtype, which Lightning sets to 16 bits for precisions such as bf16-true.
    zeros = partial(torch.zeros, dtype=torch.float32, device=device)
    return Received(zeros(batch, heads, keys), zeros(batch, heads, groups, len(distance_edges(keys)) - 1))
