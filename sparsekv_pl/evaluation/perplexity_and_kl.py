"""Perplexity of a continuation and of its recalled words, and forward KL from the full cache's predictions."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsekv_pl.models.head import Head, as_head
from sparsekv_pl.objectives.losses import distillation_loss, log_probabilities
from sparsekv_pl.storage.records import Record

STRETCH = 128
"""Tokens of a continuation that are scored together; longer ones have the scores of each stretch too."""
KEPT_FLOATS = 2**27
"""Most log-probabilities that are stored (half a gigabyte); with more, they are recomputed for each reading."""


class FullCacheReading:
    """A batch's continuations read with the full cache: the reference for readings after eviction.

    Parameters
    ----------
    hidden
        (B, T, E) hidden states with the full cache.
    head
        The LM head; a tensor is its weight (V, E).
    ids, lengths
        (B, T) token ids of the continuations, and the number of valid tokens per row.
    recalled
        (B, T) bool, the tokens of recalled words (recalled_words.py); None does not score them.
    """

    def __init__(
        self, hidden: Tensor, head: Head | Tensor, ids: Tensor, lengths: Sequence[int], recalled: Tensor | None = None
    ) -> None:
        self.hidden, self.head, self.ids, self.lengths, self.recalled = hidden, as_head(head), ids, lengths, recalled
        self._keeps = sum(lengths) * len(self.head.weight) <= KEPT_FLOATS
        self._kept: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def scores(self, hidden: Tensor) -> list[Record]:
        """``reading_scores`` of each row of ``hidden`` (B, T, E), with the ``recalled_nll`` of ``recalled_tokens``.

        A continuation of more than ``STRETCH`` tokens also has ``text_stretches``: [tokens, nll] of each stretch.
        """
        return [self._row(row, hidden[row]) for row in range(len(self.lengths))]

    def _row(self, row: int, hidden: Tensor) -> Record:
        sums = self.hidden.new_zeros(4, dtype=torch.float64)  # read once, because each read waits for the GPU
        recalled = torch.zeros_like(self.ids[row], dtype=torch.bool) if self.recalled is None else self.recalled[row]
        stretches = []
        for start, stop in _chunks(self.lengths[row] - 1):
            log_q = log_probabilities(hidden[start:stop], self.head)
            labels = self.ids[row, start + 1 : stop + 1, None]
            own, told = -log_q.gather(-1, labels)[:, 0], recalled[start + 1 : stop + 1]
            log_p = self._log_p(row, start, stop)
            kl = log_q.neg_().add_(log_p).mul_(log_p.exp()).sum()
            stretches.append(torch.stack([own.sum(), kl, (own * told).sum(), told.sum().to(own.dtype)]))
            sums += stretches[-1]
        nll, divergence, recalled_nll, recalled_tokens = sums.tolist()
        scores: Record = {"nll": nll, "kl": max(0.0, divergence), "tokens": max(0, self.lengths[row] - 1)}
        if len(stretches) > 1:
            counts = [stop - start for start, stop in _chunks(self.lengths[row] - 1)]
            scores["text_stretches"] = [
                list(pair) for pair in zip(counts, torch.stack(stretches)[:, 0].tolist(), strict=True)
            ]
        if self.recalled is None:
            return scores
        return scores | {"recalled_nll": recalled_nll, "recalled_tokens": int(recalled_tokens)}

    def _log_p(self, row: int, start: int, stop: int) -> Tensor:
        if (row, start) in self._kept:
            return self._kept[row, start]
        log_p = log_probabilities(self.hidden[row, start:stop], self.head)
        if self._keeps:
            self._kept[row, start] = log_p
        return log_p


def reading_scores(hidden: Tensor, teacher: Tensor, head: Head | Tensor, ids: Tensor) -> Record:
    """Sum negative log-likelihood and forward KL (nats) over a continuation without its first token.

    Parameters
    ----------
    hidden, teacher
        (T, E) hidden states after eviction and with the full cache.
    head
        The LM head; a tensor is its weight (V, E).
    ids
        (T,) token ids.

    Returns
    -------
    ``nll``, ``kl`` and the number of ``tokens``.
    """
    losses = distillation_loss(hidden[:-1], teacher[:-1], head, ids[1:], kl_weight=1.0)
    nll, kl, tokens = torch.stack([losses.cross_entropy, losses.kl, losses.tokens.to(losses.kl)]).tolist()
    return {"nll": nll * tokens, "kl": max(0.0, kl) * tokens, "tokens": int(tokens)}


def _chunks(tokens: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + STRETCH, tokens)) for start in range(0, tokens, STRETCH))
