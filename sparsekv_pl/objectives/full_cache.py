"""Hold the full cache: supervise the student after the cache as it was before the eviction."""

from dataclasses import dataclass
from typing import ClassVar

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.other_tokens import OtherTokens


@dataclass
class FullCache(OtherTokens):
    """Apply an objective over tokens to the same continuation, read after the whole cache.

    Aligning a press's scores changes keys and queries, and with them what the model does when nothing is evicted. This
    holds it there too. The context is read once and the continuation twice, so the context must be one chunk. Use it in
    ``Mixed``, beside the objectives under eviction.

    Parameters
    ----------
    objective
        EIT or LM; its terms are logged as ``full_cache/TERM``.
    """

    wanted: ClassVar[str] = "full_cache"
    asks: ClassVar[Request] = Request(full_cache=True)
