"""What a continuation that was read shows: perplexity, and KL from what the full cache makes of it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsekv_pl.objectives.losses import CHUNK_TOKENS, distillation_loss, log_probabilities
from sparsekv_pl.storage.records import Record

KEPT_FLOATS = 2**27
"""Of log-probabilities, half a gigabyte; where a batch has more of them they are computed for each reading."""


class FullCacheReading:
    """A batch's continuations as read with the full cache; other readings are compared with it.

    Parameters
    ----------
    hidden
        (B, T, E), with the full cache.
    head
        (V, E), the LM head's weight.
    ids, lengths
        (B, T) the continuations, and how many tokens of each row count.
    """

    def __init__(self, hidden: Tensor, head: Tensor, ids: Tensor, lengths: Sequence[int]) -> None:
        self.hidden, self.head, self.ids, self.lengths = hidden, head, ids, lengths
        self._keeps = sum(lengths) * len(head) <= KEPT_FLOATS
        self._kept: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def scores(self, hidden: Tensor) -> list[Record]:
        """``reading_scores`` of each row of ``hidden`` (B, T, E)."""
        return [self._row(row, hidden[row]) for row in range(len(self.lengths))]

    def _row(self, row: int, hidden: Tensor) -> Record:
        sums = self.hidden.new_zeros(2, dtype=torch.float64)  # read once: each look at a number waits for a GPU
        for start, stop in _chunks(self.lengths[row] - 1):
            log_q = log_probabilities(hidden[start:stop], self.head)
            labels = self.ids[row, start + 1 : stop + 1, None]
            own = -log_q.gather(-1, labels).sum()
            log_p = self._log_p(row, start, stop)
            sums += torch.stack([own, log_q.neg_().add_(log_p).mul_(log_p.exp()).sum()])
        nll, kl = sums.tolist()
        return {"nll": nll, "kl": max(0.0, kl), "tokens": max(0, self.lengths[row] - 1)}

    def _log_p(self, row: int, start: int, stop: int) -> Tensor:
        if (row, start) in self._kept:
            return self._kept[row, start]
        log_p = log_probabilities(self.hidden[row, start:stop], self.head)
        if self._keeps:
            self._kept[row, start] = log_p
        return log_p


def reading_scores(hidden: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Record:
    """Sums over the tokens ``ids`` (T,) of a continuation but the first, in nats, and how many they are.

    ``hidden`` and ``teacher`` (T, E) are what was made of them, here and with the full cache; ``head`` (V, E).
    """
    losses = distillation_loss(hidden[:-1], teacher[:-1], head, ids[1:], kl_weight=1.0)
    nll, kl, tokens = torch.stack([losses.cross_entropy, losses.kl, losses.tokens.to(losses.kl)]).tolist()
    return {"nll": nll * tokens, "kl": max(0.0, kl) * tokens, "tokens": int(tokens)}


def _chunks(tokens: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS))
