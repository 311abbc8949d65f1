"""What a cache keeps of a context: its tokens, the pairs that stayed, and where the next token goes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekv_pl.eviction.cache_layers import CARRIED, PAIRS, cache_of
from sparsekv_pl.eviction.packed_codes import PackedCodes
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.quantised_pairs import PackedPairs, PairQuantisation
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill

CODES = ("codes", "steps", "least")
PACKED = tuple(f"{pair}_{part}" for pair in PAIRS for part in CODES)
LAYERS = (*PAIRS, *PACKED, "positions", "first", "places", *CARRIED)
"""Kinds of tensors, by layer: pairs (1, K, S, D), of which quantised ones are ``PackedCodes`` and only the newest are
whole; the kept keys' context positions (1, K, S); for re-rotated keys those as first kept (1, K, S, D) and their
positions then (1, K, S); and the states of layers without attention."""


@dataclass(frozen=True)
class KeptContext:
    """An evicted context of one row. Its tensors are never written to, so that caches may share them."""

    ids: Tensor
    """(1, L) int64 on the host, all tokens that were read."""
    bounds: Sequence[tuple[int, int]]
    """(start, stop) of each chunk that was read."""
    next_position: int
    """RoPE position of the first token that follows."""
    tensors: Mapping[str, Tensor]
    """"keys.0", "values.0" ... by ``LAYERS``; positions only where the press's scores say what it kept."""
    quantisation: PairQuantisation | None = None
    """How the pairs are stored in layers that presses evict from; None if all are whole."""
    evicted: Sequence[int] = ()
    """The layers in which presses evict; empty for all."""

    @classmethod
    def of(cls, filling: ChunkedPrefill, ids: Tensor) -> "KeptContext":
        """Take what a finished prefill of ``ids`` (1, L) left."""
        prefilled, state = filling.result(), filling.state_dict()
        assert not any(name.startswith("log_weights") for name in state)  # presses fade pairs out in training alone
        tensors = {name: state[name].contiguous() for name in state if name.partition(".")[0] in LAYERS}
        read, evicted = tuple(filling.bounds), tuple(filling.layers)
        kept = cls(ids.cpu(), read, prefilled.next_position, tensors, evicted=evicted)
        packed = filling.packed if isinstance(filling, QuantisedPrefill) else {}
        return kept._holding(packed) if packed else kept

    @classmethod
    def empty(cls) -> "KeptContext":
        """Return the context of no token: what is asked of it is a text by itself, read with its full cache."""
        return cls(torch.empty(1, 0, dtype=torch.long), (), 0, {})

    @property
    def tokens(self) -> int:
        """L, the tokens that were read."""
        return self.ids.shape[1]

    @property
    def layers(self) -> int:
        """Number of layers with a cache."""
        return 1 + max((int(name.partition(".")[2]) for name in self.tensors), default=-1)

    @property
    def packed_layers(self) -> list[int]:
        """The layers with quantised pairs."""
        return [layer for layer in range(self.layers) if f"keys_codes.{layer}" in self.tensors]

    @property
    def kept_pairs(self) -> float:
        """KV pairs per head, a mean over the layers in which presses evict."""
        layers = self.evicted or range(self.layers)
        names = [f"{kind}.{layer}" for kind in ("keys", "keys_codes") for layer in layers]
        return sum(self.tensors[name].shape[2] for name in names if name in self.tensors) / max(1, len(layers))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys, values and states of all layers; of quantised ones with their scales and minima."""
        return sum(tensor.nbytes for kind in (*PAIRS, *PACKED, *CARRIED) for tensor in self.each(kind))

    @property
    def held_bytes(self) -> int:
        """Bytes of everything that is held: beside ``kv_bytes`` the positions, and keys as first kept."""
        return sum(tensor.nbytes for tensor in (self.ids, *self.tensors.values()))

    @property
    def tokens_sha256(self) -> str:
        """SHA-256 of the token ids as little-endian 64-bit integers."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def each(self, kind: str) -> list[Tensor]:
        """Return the tensors of one kind, layer by layer; empty if there are none."""
        names = (f"{kind}.{layer}" for layer in range(self.layers))
        return [self.tensors[name] for name in names if name in self.tensors]

    def prefilled(self, rows: int) -> Prefilled:
        """Return a cache of ``rows`` equal rows to be continued; this context stays as it is."""
        own: list[dict[str, Tensor]] = []
        for layer in range(self.layers):
            states = {name: self.tensors.get(f"{name}.{layer}") for name in CARRIED}
            own.append({name: one.repeat_interleave(rows, 0) for name, one in states.items() if one is not None})
            if f"keys.{layer}" in self.tensors:
                pairs = zip(PAIRS, self.pairs(layer), strict=True)
                own[layer] |= {name: one.expand(rows, -1, -1, -1) for name, one in pairs}  # copied by the cache
        return Prefilled(cache_of(own), self.next_position, [])

    def pairs(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values (1, K, S, D) as attention reads them."""
        keys, values = (self.tensors[f"{pair}.{layer}"] for pair in PAIRS)
        if self.quantisation is None or f"keys_codes.{layer}" not in self.tensors:
            return keys, values
        of_keys, of_values = (
            PackedCodes(*(self.tensors[f"{pair}_{part}.{layer}"] for part in CODES)) for pair in PAIRS
        )
        return PackedPairs(self.quantisation, of_keys, of_values, keys, values).unpacked()

    def whole(self) -> "KeptContext":
        """Return this context with pairs as attention reads them."""
        if self.quantisation is None:
            return self
        tensors = {name: one for name, one in self.tensors.items() if name.partition(".")[0] not in PACKED}
        for layer in self.packed_layers:
            tensors |= {f"{pair}.{layer}": part for pair, part in zip(PAIRS, self.pairs(layer), strict=True)}
        return replace(self, tensors=tensors, quantisation=None)

    def stored_like(self, other: "KeptContext") -> "KeptContext":
        """Return this context, whose pairs are whole, stored as those of ``other``."""
        how = other.quantisation
        if how is None:
            return self
        return self._holding({layer: PackedPairs.of(*self.pairs(layer), how) for layer in other.packed_layers})

    def _holding(self, packed: Mapping[int, PackedPairs]) -> "KeptContext":
        """Return this context with the pairs of some layers as ``packed``."""
        tensors = dict(self.tensors)
        for layer, one in packed.items():
            tensors |= {f"keys.{layer}": one.newest_keys, f"values.{layer}": one.newest_values}
            for pair, codes in zip(PAIRS, (one.keys, one.values), strict=True):
                tensors |= {f"{pair}_{part}.{layer}": getattr(codes, part) for part in CODES}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return replace(self, tensors=tensors, quantisation=next(iter(packed.values())).settings)

    def resume(self, filling: ChunkedPrefill) -> None:
        """Load this context into a prefill whose ``given`` chunks are ``bounds``."""
        device = next(iter(self.tensors.values())).device
        done = {"chunks_done": self.ids.new_tensor(len(self.bounds)), "token_ids": self.ids.to(device)}
        filling.load_state_dict({**self.whole().tensors, **done})
