"""Supervise the context itself: every chunk after the first is a continuation of the evicted cache."""

from dataclasses import dataclass
from typing import ClassVar

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.other_tokens import OtherTokens


@dataclass
class Chunks(OtherTokens):
    """Apply an objective over tokens to the context's chunks after the first.

    Each of their tokens sees its own chunk in full and what the eviction kept of the chunks before, and predicts the
    next token. So most of what is read carries loss, not the continuation alone; the context needs several chunks
    (``RealEviction.chunk_tokens``). Use it in ``Mixed``, beside the continuation's own objective.

    Parameters
    ----------
    objective
        EIT or LM; its terms are logged as ``chunks/TERM``.
    """

    wanted: ClassVar[str] = "chunks"
    asks: ClassVar[Request] = Request(chunks=True)
