"""Scores of continuations against one reading with the full cache equal the losses', with fewer products."""

import pytest
import torch
from torch import Tensor

from sparsekv_pl.evaluation import perplexity_and_kl as reading
from sparsekv_pl.evaluation.perplexity_and_kl import FullCacheReading, reading_scores

LENGTHS = [9, 2, 1]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Another reading and the full cache's (B, T, E), the head (V, E) and the tokens (B, T)."""
    generator = torch.Generator().manual_seed(0)
    hidden, full = (torch.randn(3, 9, 16, generator=generator).to(dtype) for _ in range(2))
    ids = torch.randint(50, (3, 9), generator=generator)
    return hidden, full, torch.randn(50, 16, generator=generator).to(dtype), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_scores_are_those_of_the_loss(kept: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_TOKENS", 3)
    if not kept:
        monkeypatch.setattr(reading, "KEPT_FLOATS", 0)
    hidden, full, head, ids = inputs(dtype)
    compared = FullCacheReading(full, head, ids, LENGTHS)
    for other in (hidden, full, hidden):
        for row, (scores, length) in enumerate(zip(compared.scores(other), LENGTHS, strict=True)):
            expected = reading_scores(other[row, :length], full[row, :length], head, ids[row, :length])
            assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert [record["kl"] for record in compared.scores(full)] == [0.0, 0.0, 0.0]


def test_the_full_cache_s_logits_are_computed_once_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, full, head, ids = inputs(torch.float32)
    calls = []

    def count(rows: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(rows))
        return (rows @ weight.T).log_softmax(-1)

    monkeypatch.setattr(reading, "log_probabilities", count)
    compared = FullCacheReading(full, head, ids, LENGTHS)
    compared.scores(hidden)
    first = len(calls)
    compared.scores(hidden)
    assert (first, len(calls)) == (4, 6), "two rows have tokens to score"
