"""A model's attention by token type, position, distance and head, and the anchors recommended from it.

Early tokens look important for two reasons that say nothing about them: more queries see them, and those queries have
fewer keys. Everything is therefore compared with attention spread evenly over the keys that a query sees ("chance").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekv_pl.analysis.token_types import TYPES
from sparsekv_pl.attention.received_attention import (
    ReceivedAttention,
    carrying_share,
    distance_edges,
    exposure,
)
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.storage.records import rounded

LEADING = 16
"""Number of positions at the start of the text that are measured one by one: the most sinks that can be recommended."""
GROUPS = LEADING + len(TYPES)
DIGITS = 6
"""Significant digits of stored numbers."""

Floats = NDArray[np.float64]
Cells = NDArray[np.bool_]
"""A selection of a profile's cells: (LEADING + 1, types, bins of distance), or a shape that broadcasts to it."""


@dataclass(frozen=True)
class Portion:
    """The attention on a set of tokens, averaged over queries, heads, layers and windows."""

    attention: float
    """Share of all attention."""
    tokens: float
    """Share of the tokens that a query sees, which is the set's attention by chance."""
    per_token: float | None
    """Share of a query's attention on one such token that the query sees; None if there is no such token."""
    times_chance: float | None
    """Multiple of chance: ``attention`` / ``tokens``, both as shares of the cells that the set was chosen from."""


@dataclass(frozen=True)
class AnchorProfile:
    """Attention of W windows of text by cells of (place, type, distance).

    A place is one of the ``LEADING`` first positions or, as the last index, any other position; a type is one of
    ``TYPES``; a distance is a bin of ``edges`` in tokens. All arrays are float64 sums over a window's queries.
    """

    edges: list[int]
    mass: Floats
    """(W, layers, LEADING + 1, types, bins), averaged over heads."""
    chance: Floats
    """(W, LEADING + 1, types, bins), like the next two."""
    pairs: Floats
    last: Floats
    """Number of tokens that a window's last query sees."""
    positions: list[int]
    """Edges of the bins of positions: 0, 1, ..., LEADING, 2 * LEADING, 4 * LEADING, ..."""
    position_mass: Floats
    """(W, layers, bins of positions)"""
    position_chance: Floats
    """(W, bins of positions)"""
    position_pairs: Floats
    carrying: Floats
    """(layers, H), ``carrying_share`` of the keys, averaged over windows."""
    carrying_by_chance: float

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "AnchorProfile":
        """Combine the records of ``profile_records``, whose windows may differ in length."""
        longest = max(record["length"] for record in records)
        edges, positions = distance_edges(longest), position_edges(longest)
        cells = {
            name: np.stack([_by_cell(record, name, len(edges) - 1) for record in records])
            for name in ("mass", "chance", "pairs", "last")
        }
        curves = {
            f"position_{name}": np.stack([_wide(record[f"position_{name}"], len(positions) - 1) for record in records])
            for name in ("mass", "chance", "pairs")
        }
        heads = np.mean([record["carrying"] for record in records], axis=0)
        even = float(np.mean([record["carrying_by_chance"] for record in records]))
        return cls(edges=edges, positions=positions, **cells, **curves, carrying=heads, carrying_by_chance=even)

    @property
    def everything(self) -> Cells:
        """All cells."""
        return np.ones(self.chance.shape[1:], bool)

    def sinks(self, count: int) -> Cells:
        """The first ``count`` tokens of a text. Raises ``ValueError`` for more than ``LEADING``."""
        if count > LEADING:
            raise ValueError(f"{count} sinks: only the first {LEADING} positions are measured one by one, give fewer")
        return self.everything & (np.arange(LEADING + 1) < count)[:, None, None]

    def recent(self, count: int) -> Cells:
        """The last ``count`` tokens that a query sees, its own included. Raises ``ValueError`` for a missing edge."""
        if count not in self.edges and count < self.edges[-1]:
            raise ValueError(f"recent={count} is not an edge of the bins of distance: choose one of {self.edges}")
        return self.everything & (np.array(self.edges[1:]) <= count)

    def types(self, *names: str) -> Cells:
        """Tokens of these types at any place."""
        return self.everything & np.isin(TYPES, names)[:, None]

    def kept(self, anchors: Anchors) -> Cells:
        """Tokens that ``anchors`` keep for a query, if all other tokens before it are evicted."""
        kinds = [name for name in ("special", "punctuation") if getattr(anchors, name)]
        return self.sinks(anchors.sinks) | self.recent(anchors.recent) | self.types(*kinds)

    def sums(self, chosen: Cells, among: Cells) -> Floats:
        """(W, 5) sums: mass, chance and pairs of the cells ``chosen``, mass and chance of the cells ``among``."""
        mass = self.mass.mean(1)
        parts = [(mass, chosen), (self.chance, chosen), (self.pairs, chosen), (mass, among), (self.chance, among)]
        return np.stack([(array * cells).sum((1, 2, 3)) for array, cells in parts], axis=1)

    def portion(self, chosen: Cells, among: Cells | None = None) -> Portion:
        """The attention on the cells ``chosen``; ``times_chance`` compares them with ``among`` (None: all cells)."""
        mass, chance, pairs, mass_among, chance_among = self.sums(
            chosen, self.everything if among is None else among
        ).sum(0)
        queries = self.chance.sum()
        return Portion(
            attention=float(mass / queries),
            tokens=float(chance / queries),
            per_token=float(mass / pairs) if pairs else None,
            times_chance=float(mass / mass_among / (chance / chance_among)) if chance and mass_among else None,
        )

    def by_layer(self, chosen: Cells) -> Floats:
        """(layers,): each layer's share of attention on the chosen cells."""
        return (self.mass * chosen).sum((0, 2, 3, 4)) / self.chance.sum()

    def held(self, cells: Cells) -> list[tuple[int, float]]:
        """(edge, share of the cells' attention below that distance) for every bin of distance."""
        mass = (self.mass * cells).sum((0, 1, 2, 3))
        return list(zip(self.edges[1:], (mass.cumsum() / mass.sum()).tolist(), strict=True))

    def tokens_kept(self, anchors: Anchors) -> float:
        """Number of tokens that ``anchors`` keep after a window's last token, averaged over windows."""
        return float((self.last * self.kept(anchors)).sum() / len(self.last))


@dataclass(frozen=True)
class AnchorRule:
    """Anchors recommended from a profile, with the reasons."""

    anchors: Anchors
    reasons: Mapping[str, str]
    """Parameter of ``Anchors`` -> reason for its value."""


def recommended(profile: AnchorProfile, threshold: float = 2.0, recent_mass: float = 0.5) -> AnchorRule:
    """Recommend anchors from a profile.

    sinks
        The unbroken run of positions from the first that receive at least ``threshold`` times chance. Early queries,
        which see few other tokens, pull this towards 1: use windows of several hundred tokens.
    recent
        The smallest power of two such that this many nearest tokens, without sinks, hold at least the share
        ``recent_mass`` of the attention that is not on sinks.
    special, punctuation
        Whether the tokens of this type, without sinks and recent tokens, receive at least ``threshold`` times chance
        among all tokens that are neither. A type that does not occur there keeps the default of ``Anchors``.

    Raises ``ValueError`` for a threshold that is not positive, and a share that is not between 0 and 1.
    """
    leading = [profile.portion(profile.sinks(n + 1) & ~profile.sinks(n)).times_chance or 0.0 for n in range(LEADING)]
    sinks = next((n for n, times in enumerate(leading) if times < threshold), LEADING)
    rest = ~profile.sinks(sinks)
    held = profile.held(rest)
    recent = next((edge for edge, share in held if share >= recent_mass - 1e-9), held[-1][0])
    far = rest & ~profile.recent(recent)
    times = {name: profile.portion(far & profile.types(name), far).times_chance for name in ("special", "punctuation")}
    default = Anchors()
    flags = {name: getattr(default, name) if n is None else n >= threshold for name, n in times.items()}
    last = f", the next {leading[sinks]:.2f}" if sinks < LEADING else ""
    reasons = {
        "sinks": f"{', '.join(f'{n:.1f}' for n in leading[:sinks]) or 'none'} times chance{last}; asked: {threshold:g}",
        "recent": f"{dict(held)[recent]:.0%} of the attention that is not on sinks; asked: {recent_mass:.0%}",
        **{name: _reason(n, threshold) for name, n in times.items()},
    }
    return AnchorRule(Anchors(sinks=sinks, recent=recent, **flags), reasons)


def groups_of(types: Tensor) -> Tensor:
    """(B, S) group of each key, below ``GROUPS``: its position if below ``LEADING``, otherwise one per type."""
    positions = torch.arange(types.shape[1], device=types.device)
    return torch.where(positions < LEADING, positions, LEADING + types)


def position_edges(length: int) -> list[int]:
    """Edges of the bins of positions: 0 to ``LEADING`` singly, then doubling until ``length`` is reached."""
    edges = list(range(min(LEADING, length) + 1))
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return edges


def profile_records(observer: ReceivedAttention, types: Tensor, carrying: float) -> list[dict[str, Any]]:
    """Convert observations to a JSON-able record per row of ``types`` (B, S), numbers with six digits."""
    seen = exposure(observer.groups, observer.count)
    layers = [observer.layers[layer] for layer in sorted(observer.layers)]
    mass = stacked([layer.by_group.mean(1) for layer in layers], 1).cpu()
    by_key = stacked([layer.by_key.mean(1) for layer in layers], 1).cpu()
    shares = stacked([carrying_share(layer.by_key, carrying) for layer in layers], 1).cpu()
    starts = position_edges(types.shape[1])[:-1]
    shared = {
        "length": types.shape[1],
        "carrying_by_chance": float(carrying_share(seen.chance_by_key, carrying)),
        "position_chance": _binned(seen.chance_by_key, starts),
        "position_pairs": _binned(seen.pairs_by_key, starts),
    }
    return [
        {
            **shared,
            **{name: rounded(getattr(seen, name)[row].tolist(), DIGITS) for name in ("chance", "pairs", "last")},
            "leading_types": types[row, :LEADING].tolist(),
            "mass": rounded(mass[row].tolist(), DIGITS),
            "position_mass": _binned(by_key[row], starts),
            "carrying": rounded(shares[row].tolist(), DIGITS),
        }
        for row in range(len(types))
    ]


def _by_cell(record: Mapping[str, Any], name: str, bins: int) -> Floats:
    """Convert a record's (..., groups, bins) to cells (..., LEADING + 1, types, bins)."""
    groups = _wide(record[name], bins)
    cells = np.zeros((*groups.shape[:-2], LEADING + 1, len(TYPES), bins))
    for place, kind in enumerate(record["leading_types"]):
        cells[..., place, kind, :] = groups[..., place, :]
    cells[..., LEADING, :, :] = groups[..., LEADING:, :]
    return cells


def _wide(values: Any, bins: int) -> Floats:
    """``values`` as an array with its last axis padded with 0 to ``bins``."""
    array = np.asarray(values, np.float64)
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, bins - array.shape[-1])])


def _reason(times: float | None, threshold: float) -> str:
    if times is None:
        return "none outside sinks and recent tokens in this text: the default"
    return f"{times:.2f} times chance outside sinks and recent tokens; asked: {threshold:g}"


def _binned(values: Tensor, starts: list[int]) -> Any:
    """``values`` (..., S) summed over bins of positions that begin at ``starts``."""
    return rounded(np.add.reduceat(values.cpu().double().numpy(), starts, axis=-1).tolist(), DIGITS)
