"""Perplexity, KL and stability of a measured point equal what plain references compute."""

import pytest
import torch
from kvpress import KnormPress
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsekv_pl.evaluation import perplexity_and_kl as reading
from sparsekv_pl.evaluation.context_sparsity import attention_sparsity
from sparsekv_pl.evaluation.perplexity_and_kl import FullCacheReading, reading_scores
from sparsekv_pl.evaluation.stability_probe import StabilityProbe
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.head import Head

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
    monkeypatch.setattr(reading, "STRETCH", 3)
    if not kept:
        monkeypatch.setattr(reading, "KEPT_FLOATS", 0)
    hidden, full, head, ids = inputs(dtype)
    compared = FullCacheReading(full, head, ids, LENGTHS)
    for other in (hidden, full, hidden):
        for row, (scores, length) in enumerate(zip(compared.scores(other), LENGTHS, strict=True)):
            expected = reading_scores(other[row, :length], full[row, :length], head, ids[row, :length])
            stretches = scores.pop("text_stretches", [])
            assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)
            if length > 4:
                parts = [slice(start, start + 4) for start in range(0, length - 1, 3)]
                own = [reading_scores(other[row, part], full[row, part], head, ids[row, part]) for part in parts]
                assert stretches == [[part["tokens"], pytest.approx(part["nll"], rel=1e-5)] for part in own]
    assert [record["kl"] for record in compared.scores(full)] == [0.0, 0.0, 0.0]


def test_the_full_cache_s_logits_are_computed_once_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, full, head, ids = inputs(torch.float32)
    calls = []

    def count(rows: Tensor, own: Head) -> Tensor:
        calls.append(len(rows))
        return own.logits(rows).log_softmax(-1)

    monkeypatch.setattr(reading, "log_probabilities", count)
    compared = FullCacheReading(full, head, ids, LENGTHS)
    compared.scores(hidden)
    first = len(calls)
    compared.scores(hidden)
    assert (first, len(calls)) == (4, 6), "two rows have tokens to score"


CONTEXT, CONTINUATION = 40, 8


@pytest.fixture(scope="module")
def eager(tiny_models: dict[str, str]):
    return AutoModelForCausalLM.from_pretrained(
        tiny_models["llama"], dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, 1024, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))


def test_retained_importance_is_eager_attention_on_what_knorm_keeps(eager, ids: torch.Tensor) -> None:
    lengths = [CONTINUATION, 5]
    recorded = RecordedPrefill(eager, ids[:, :CONTEXT])
    records = StabilityProbe(recorded, ids[:, CONTEXT:], torch.tensor(lengths)).of(KnormPress(0.5))
    with torch.no_grad():
        attentions = eager(ids, output_attentions=True).attentions
    for row, (record, length) in enumerate(zip(records, lengths, strict=True)):
        minima, means, variances = [], [], []
        for layer, attention in enumerate(attentions):
            paid = attention[row, :, CONTEXT : CONTEXT + length, :CONTEXT].view(2, 2, length, CONTEXT).mean(1)
            kept = (-recorded.cache.layers[layer].keys[row].norm(dim=-1)).topk(CONTEXT // 2).indices
            shares = paid.gather(2, kept[:, None].expand(-1, length, -1)).sum(-1) / paid.sum(-1)
            minima.append(shares.amin(-1))
            means.append(shares.mean(-1))
            variances.append(shares.var(-1, correction=0))
        for name, values in (("min_retained", minima), ("mean_retained", means), ("retained_variance", variances)):
            assert record[name] == pytest.approx(float(torch.stack(values).mean()), rel=1e-3)


def test_knorm_keeps_nearly_the_same_of_a_context_in_a_longer_prompt(eager, ids: torch.Tensor) -> None:
    probe = StabilityProbe(RecordedPrefill(eager, ids[:, :CONTEXT]), ids[:, CONTEXT:], torch.tensor([8, 8]))
    half = probe.of(KnormPress(0.5))[0]
    assert 0.7 < half["overlap_prompts"] <= 1, "its scores do not depend on what follows, only the number kept does"
    assert 0 < half["overlap_steps"] < 1


def test_sparsity_is_that_of_eager_attention(eager, ids: torch.Tensor, tiny_models: dict[str, str]) -> None:
    from transformers import AutoTokenizer

    from sparsekv_pl.models.anchors import Anchors

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    found = attention_sparsity(eager, tokenizer, ids)
    with torch.no_grad():
        attentions = torch.stack(eager(ids, output_attentions=True).attentions)
    entropy = -(attentions * attentions.clamp(min=1e-30).log()).sum(-1)
    torch.testing.assert_close(
        torch.tensor(found["effective_support"]), entropy.exp().mean((1, 3)), rtol=1e-4, atol=1e-4
    )
    anchors = Anchors(recent=0).mask(ids, tokenizer)
    assert 0 < anchors.float().mean() < 1
    share = (attentions * anchors[None, :, None, None]).sum(-1).mean((1, 3))
    torch.testing.assert_close(torch.tensor(found["anchor_share"]), share, rtol=1e-4, atol=1e-5)
