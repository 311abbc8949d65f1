"""Real eviction in training: the context runs through the model in chunks and a press shrinks the cache after each.

``prefill`` does it, with and without gradients, for training and evaluation, so the two cannot drift apart.
"""

from dataclasses import dataclass

from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.prefill import check_chunks, chunk_bounds, continue_from, mean_length, prefill
from sparsekv_pl.eviction.result import Evicted
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.scores import set_compression_ratio


@dataclass
class ChunkedEviction:
    """Evict for real with any kvpress press.

    Parameters
    ----------
    press
        Selects what stays.
    chunk_tokens
        Most tokens per chunk; null runs the context in one. Chunks are cut as equal as they can be.
    budget
        KV pairs per head that the cache may keep, in tokens. Where it is smaller than what the compression ratio would
        keep, it decides; with it memory stays flat however long the context is.
    catch_scores
        Keep the press's scores, differentiable, for a selection loss.
    """

    press: BasePress
    chunk_tokens: int | None = None
    budget: int | None = None
    catch_scores: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token, or null")

    def check(self, context_tokens: int) -> None:
        """Raise ``ValueError`` if a chunk would be too short for the press, or the press cannot be run in chunks."""
        check_chunks(self.press, chunk_bounds(context_tokens, self.chunk_tokens), self.catch_scores)

    def __call__(
        self,
        model: PreTrainedModel,
        context_ids: Tensor,
        continuation_ids: Tensor,
        *,
        compression_ratio: float,
        step: int,
    ) -> Evicted:
        """Run context and continuation with an eviction between the two. See ``Eviction``."""
        press = self.press
        if isinstance(press, EvictionAugPress):
            press.draw(step)
        set_compression_ratio(press, compression_ratio)
        prefilled = prefill(model, context_ids, press, self.chunk_tokens, self.budget, self.catch_scores)
        kept = mean_length(prefilled.cache)
        hidden = continue_from(model, continuation_ids, prefilled.cache, prefilled.next_position)
        return Evicted(hidden, kept / context_ids.shape[1], prefilled.selections)
