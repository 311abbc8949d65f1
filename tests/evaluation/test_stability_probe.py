"""The stability probe compared with eager attention and with the press's scores."""

import pytest
import torch
from kvpress import KnormPress
from transformers import AutoModelForCausalLM

from sparsekv_pl.evaluation.context_sparsity import attention_sparsity
from sparsekv_pl.evaluation.stability_probe import StabilityProbe
from sparsekv_pl.eviction.replay import RecordedPrefill

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
