"""What a cache keeps of a context: its tokens, the pairs that stayed, and where the next token goes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled

LAYERS = ("keys", "values", "positions", "first", "places")
"""Kinds of tensors, by layer: pairs (1, K, S, D), the kept keys' context positions (1, K, S), and for re-rotated keys
those as first kept (1, K, S, D) and their positions then (1, K, S)."""


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

    @classmethod
    def of(cls, filling: ChunkedPrefill, ids: Tensor) -> "KeptContext":
        """Take what a finished prefill of ``ids`` (1, L) left."""
        prefilled, state = filling.result(), filling.state_dict()
        assert not any(name.startswith("log_weights") for name in state)  # presses fade pairs out in training alone
        tensors = {name: state[name].contiguous() for name in state if name.partition(".")[0] in LAYERS}
        return cls(ids.cpu(), tuple(filling.bounds), prefilled.next_position, tensors)

    @property
    def tokens(self) -> int:
        """L, the tokens that were read."""
        return self.ids.shape[1]

    @property
    def layers(self) -> int:
        """Number of layers with a cache."""
        return sum(name.startswith("keys.") for name in self.tensors)

    @property
    def kept_pairs(self) -> float:
        """KV pairs per head, a mean over layers."""
        return sum(keys.shape[2] for keys in self.each("keys")) / self.layers

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for kind in ("keys", "values") for tensor in self.each(kind))

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
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.each("keys"), self.each("values"), strict=True)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)  # copies
        return Prefilled(cache, self.next_position, [])

    def resume(self, filling: ChunkedPrefill) -> None:
        """Load this context into a prefill whose ``earlier`` chunks are ``bounds``."""
        device = self.tensors["keys.0"].device
        filling.load_state_dict(
            {**self.tensors, "chunks_done": self.ids.new_tensor(len(self.bounds)), "token_ids": self.ids.to(device)}
        )
