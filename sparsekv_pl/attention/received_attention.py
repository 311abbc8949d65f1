"""How much attention keys receive: each by itself, and by group of keys and distance from the query.

Queries are taken in strips, and a strip's attention over all the keys it sees is added up at once: memory grows with
the context's length, never with its square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import one_hot

STRIP_QUERIES = 64
STRIP_FLOATS = 2**24
"""A strip has as many queries as fit, B * H * Q * S floats, and at least one."""


@dataclass(frozen=True)
class Received:
    """Attention, summed over queries. B rows, H heads, S keys, G groups, N bins of distance; all float32."""

    by_key: Tensor
    """(B, H, S)"""
    by_group: Tensor
    """(B, H, G, N), bin n being distances from ``distance_edges(S)[n]`` up to, not including, the next edge."""


@dataclass(frozen=True)
class Exposure:
    """What there is to attend to, whatever the model does. Shapes as in ``Received``, without H."""

    pairs: Tensor
    """(B, G, N), pairs of a query and a key that it sees."""
    chance: Tensor
    """(B, G, N), what attention spread evenly over all that a query sees would bring, summed over queries."""
    last: Tensor
    """(B, G, N), the keys as the last query sees them: they add up to S."""
    pairs_by_key: Tensor
    """(S,), how many queries see a key."""
    chance_by_key: Tensor
    """(S,)"""


def distance_edges(keys: int) -> list[int]:
    """0, 1, 2, 4, 8, ... up to the first that is not below ``keys``; distance 0 is the query's own token.

    >>> distance_edges(9)
    [0, 1, 2, 4, 8, 16]
    """
    edges = [0, 1]
    while edges[-1] < keys:
        edges.append(2 * edges[-1])
    return edges


class ReceivedAttention:
    """An ``Observer`` (evicted_attention.py) that adds up what every layer's keys receive in one full-cache pass.

    Then ``layers[layer]`` is that layer's ``Received``. A second pass needs a second observer.

    Parameters
    ----------
    groups
        (B, S) int64, each key's group, from 0 to ``count`` - 1.
    count
        How many groups there are.
    """

    def __init__(self, groups: Tensor, count: int) -> None:
        self.groups, self.count = groups, count
        self.layers: dict[int, Received] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        """Add up one layer. ValueError if it was seen before."""
        if layer in self.layers:
            raise ValueError(f"layer {layer} was observed already: take a new ReceivedAttention for every pass")
        self.layers[layer] = received_attention(query, key, self.groups, self.count)


@torch.no_grad()
def received_attention(
    query: Tensor, key: Tensor, groups: Tensor, count: int, scaling: float | None = None
) -> Received:
    """What keys receive under softmax(query key^T * scaling), causal from the lower right, computed in float32.

    ``query`` (B, H, T, D) are the last T of the S positions of ``key`` (B, K, S, D), any dtype, H a multiple of K; the
    query heads of a group are neighbours. Rows are not padded. ``groups`` and ``count`` are those of
    ``ReceivedAttention``.

    Raises
    ------
    ValueError
        For shapes that do not fit one another, and for groups that are not between 0 and ``count`` - 1.
    """
    (batch, heads, queries, dim), (kv_heads, seen) = query.shape, key.shape[1:3]
    if heads % kv_heads or not 0 < queries <= seen or groups.shape != (batch, seen):
        raise ValueError(
            f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and groups {tuple(groups.shape)} do not fit: give "
            "(B, H, T, D), (B, K, S, D) and (B, S) with H a multiple of K and the queries the last T of the S positions"
        )
    members = _members(groups.to(key.device), count)
    total = _empty(batch, heads, seen, count, key.device)
    scaled = dim**-0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):  # it would round the products to 16 bits
        grouped = query.float().reshape(batch, kv_heads, -1, queries, dim) * scaled
        keys = key.float().unsqueeze(2).transpose(3, 4)
        for start, stop in _strips(queries, batch * heads * seen):
            first, end = seen - queries + start, seen - queries + stop
            logits = (grouped[..., start:stop, :] @ keys[..., :end]).view(batch, heads, stop - start, end)
            logits.masked_fill_(~_visible(first, end, key.device), -torch.inf)
            _add(logits.softmax(-1), first, members, total)
    return total


def exposure(groups: Tensor, count: int) -> Exposure:
    """What the queries at all S positions of ``groups`` (B, S) see of each group, by distance."""
    (batch, seen), device = groups.shape, groups.device
    members = _members(groups, count)
    total = _empty(batch, 2, seen, count, device)
    last = _empty(batch, 1, seen, count, device)
    with torch.autocast(device.type, enabled=False):
        for first, end in _strips(seen, 2 * batch * seen):
            pairs = _visible(first, end, device).float()
            both = torch.stack([pairs, pairs / pairs.sum(-1, keepdim=True)])
            _add(both.expand(batch, -1, -1, -1), first, members, total)
        _add(torch.ones(batch, 1, 1, seen, dtype=torch.float32, device=device), seen - 1, members, last)
    (pairs, chance), (pairs_by_key, chance_by_key) = total.by_group.unbind(1), total.by_key[0]
    return Exposure(pairs, chance, last.by_group[:, 0], pairs_by_key, chance_by_key)


def carrying_share(by_key: Tensor, mass: float = 0.8) -> Tensor:
    """The smallest share of the keys (..., S) that together hold ``mass`` of what all receive: (...) float64."""
    heaviest = by_key.double().sort(dim=-1, descending=True).values.cumsum(-1)
    needed = (heaviest < mass * heaviest[..., -1:]).sum(-1) + 1
    return needed.double() / by_key.shape[-1]


def _add(attention: Tensor, first: int, members: Tensor, total: Received) -> None:
    """Add ``attention`` (B, H, Q, E) of the queries at positions ``first`` to E - 1 over the E keys so far."""
    end, device = attention.shape[-1], attention.device
    positions = torch.arange(first, end, device=device)[:, None]
    for place, (near, far) in enumerate(pairwise(distance_edges(total.by_key.shape[-1]))):
        start, stop = max(0, first - far + 1), end - near  # the keys that some query of the strip has in this bin
        if stop <= start:
            break
        distance = positions - torch.arange(start, stop, device=device)
        inside = (distance >= near) & (distance < far)
        mass = (attention[..., start:stop] * inside).sum(2)
        total.by_key[..., start:stop] += mass
        total.by_group[..., place] += mass @ members[:, start:stop]


def _strips(queries: int, floats: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of strips of queries, each of which takes ``floats`` floats."""
    step = max(1, min(STRIP_QUERIES, STRIP_FLOATS // floats))
    return ((start, min(start + step, queries)) for start in range(0, queries, step))


def _visible(first: int, end: int, device: torch.device) -> Tensor:
    """(end - first, end) bool: the queries at positions ``first`` to ``end`` - 1 see themselves and what is before."""
    return torch.arange(end, device=device) <= torch.arange(first, end, device=device)[:, None]


def _members(groups: Tensor, count: int) -> Tensor:
    """(B, S, G) float32, 1 where a key belongs to a group."""
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise ValueError(f"groups go from {low} to {high}: give every key a group from 0 to {count - 1}")
    return one_hot(groups, count).float()


def _empty(batch: int, heads: int, keys: int, groups: int, device: torch.device) -> Received:
    # Not the default dtype: Lightning sets it to 16 bits where a run trains in them.
    zeros = partial(torch.zeros, dtype=torch.float32, device=device)
    return Received(zeros(batch, heads, keys), zeros(batch, heads, groups, len(distance_edges(keys)) - 1))
