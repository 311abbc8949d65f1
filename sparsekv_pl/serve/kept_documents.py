"""Documents read so far: one that is sent again is not read again. The one unused for longest leaves first."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from kvpress import BasePress

from sparsekv_pl.eviction.chunking import exceed_window
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.serve.server_metrics import ServerMetrics
from sparsekv_pl.usage.cache_origin import CacheOrigin
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel
from sparsekv_pl.usage.reading_progress import Report


class KeptDocuments:
    """The evicted caches of documents, by their tokens. One thread at a time may use it.

    Parameters
    ----------
    model, press, chunk_tokens, budget
        See ``ContextCache.prefill``.
    most_bytes
        Most bytes of caches that are kept; a larger document is answered and not kept.
    metrics
        Shows what is kept.
    """

    def __init__(
        self,
        model: LoadedModel,
        press: BasePress | None,
        chunk_tokens: int | None,
        budget: int | None,
        most_bytes: int,
        metrics: ServerMetrics,
    ) -> None:
        self.model, self.press, self.chunk_tokens, self.budget = model, press, chunk_tokens, budget
        self.most_bytes, self.metrics = most_bytes, metrics
        self.origin = CacheOrigin.of(press, chunk_tokens, budget)
        self.kept: OrderedDict[bytes, ContextCache] = OrderedDict()

    def context(self, ids: Sequence[int], report: Report | None = None) -> tuple[ContextCache, bool]:
        """Return a document's cache, and whether it had been read before; ``report`` as in ``ContextCache.prefill``.

        No document gives an empty cache. One that is no longer than the press's window is not evicted.

        Raises
        ------
        ValueError
            See ``ContextCache.prefill``.
        """
        if not ids:
            return ContextCache(self.model, None, CacheOrigin(), KeptContext.empty()), False
        key = _key(ids)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key], True
        press, budget = (self.press, self.budget) if self._long_enough(len(ids)) else (None, None)
        cache = ContextCache.prefill(
            self.model, ids, press, chunk_tokens=self.chunk_tokens, budget=budget, report=report
        )
        self.keep(cache)
        return cache, False

    def keep(self, cache: ContextCache) -> None:
        """Keep a cache, and let others leave until all fit."""
        if cache.kept.held_bytes > self.most_bytes:
            return
        self.kept[_key(cache.kept.ids[0].tolist())] = cache
        while self._held_bytes() > self.most_bytes:
            self.kept.popitem(last=False)
        caches = self.kept.values()
        self.metrics.documents.set(len(caches))
        self.metrics.document_tokens.set(sum(one.tokens for one in caches))
        self.metrics.kept_pairs.set(sum(one.kept_pairs for one in caches))
        self.metrics.document_bytes.set(sum(one.kv_bytes for one in caches))

    def load(self, path: str) -> None:
        """Keep a saved cache.

        Raises
        ------
        ValueError
            For a file of another model, and one that does not fit beside those loaded before.
        """
        cache = ContextCache.load(path, self.model)
        beside = self._held_bytes()
        if cache.kept.held_bytes + beside > self.most_bytes:
            raise ValueError(
                f"--document {path} takes {cache.kept.held_bytes:,} bytes beside {beside:,} of others, and --kept_mib "
                f"leaves {self.most_bytes:,}: raise it"
            )
        self.keep(cache)

    def _held_bytes(self) -> int:
        return sum(one.kept.held_bytes for one in self.kept.values())

    def _long_enough(self, tokens: int) -> bool:
        window = 0 if self.press is None else traits_of(self.press).window
        return exceed_window(tokens, self.chunk_tokens, window)


def _key(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(torch.tensor(ids).numpy().tobytes()).digest()
