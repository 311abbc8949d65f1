"""Hold the full cache at every token of the context: supervise what is read before the first eviction."""

from dataclasses import dataclass
from typing import ClassVar

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.other_tokens import OtherTokens


@dataclass
class FirstChunk(OtherTokens):
    """Apply an objective over tokens to the context's first chunk, where nothing has been evicted yet.

    A context of one chunk is that chunk: then the student is held to the teacher at every token that it reads, many
    times as many as a continuation has, and without reading anything twice. It costs the head's logits for these tokens
    and the last layer's MLP. At steps with local gradients only the last layer learns from it. Use it in ``Mixed``,
    beside the continuation's own objective.

    Parameters
    ----------
    objective
        EIT or LM; its terms are logged as ``first_chunk/TERM``. A large ``EIT.kl_weight`` beside a small weight in
        ``Mixed`` holds the student to the teacher and not to the text.
    """

    wanted: ClassVar[str] = "first_chunk"
    asks: ClassVar[Request] = Request(first_chunk=True)
