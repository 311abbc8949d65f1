"""Retained importance and overlaps, by hand and against eager attention."""

import pytest
import torch
from torch import Tensor

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.eviction.prefill import continue_from, prefill
from sparsekv_pl.metrics.eviction_stability import (
    ContextImportance,
    heaviest,
    overlap,
    retained_by_layer,
    retained_importance,
    retained_statistics,
)
from tests.random_models import Build

CONTEXT, CONTINUATION = 20, 6


def mask(text: str) -> Tensor:
    return torch.tensor([letter == "x" for letter in text])


IMPORTANCE = torch.tensor([[0.4, 0.3, 0.1, 0.0], [0.1, 0.1, 0.1, 0.2], [0.0, 0.0, 0.0, 0.5]])
"""Three steps: what matters moves from the first tokens to the last."""


def test_retained_importance_by_hand() -> None:
    assert retained_importance(IMPORTANCE, mask("xx..")).tolist() == pytest.approx([7 / 8, 2 / 5, 0])
    assert retained_importance(IMPORTANCE, mask("x..x")).tolist() == pytest.approx([4 / 8, 3 / 5, 1])
    assert retained_importance(IMPORTANCE, mask("xxxx")).tolist() == pytest.approx([1, 1, 1])
    assert retained_importance(IMPORTANCE, mask("....")).tolist() == [0, 0, 0]
    assert retained_importance(torch.zeros(1, 4), mask("x...")).tolist() == [1], "nothing to lose, nothing lost"


def test_mean_and_worst_case_by_hand() -> None:
    """The same mean importance retained, and not the same worst step."""
    fragile, steady = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0.75, 0.75, 0.75, 0.75])
    found = retained_statistics(torch.stack([fragile, steady]))
    assert found["mean_retained"].tolist() == [0.75, 0.75]
    assert found["min_retained"].tolist() == [0, 0.75]
    assert found["retained_variance"].tolist() == [pytest.approx(3 / 16), 0]


def test_steps_of_padding_do_not_count() -> None:
    retained = torch.tensor([[0.5, 1.0, 0.0], [0.2, 0.4, 0.6]])
    counted = torch.tensor([[True, True, False], [True, True, True]])
    found = retained_statistics(retained, counted)
    assert found["min_retained"].tolist() == pytest.approx([0.5, 0.2])
    assert found["mean_retained"].tolist() == pytest.approx([0.75, 0.4])
    assert found["retained_variance"].tolist() == pytest.approx([0.0625, 0.08 / 3])
    with pytest.raises(ValueError, match="without a counted step"):
        retained_statistics(retained, torch.zeros(2, 1, dtype=torch.bool))


def test_overlap_by_hand() -> None:
    assert overlap(mask("xx.."), mask("x.x.")).item() == pytest.approx(1 / 3)
    assert overlap(mask("xx.."), mask("xx..")).item() == 1
    assert overlap(mask("xx.."), mask("..xx")).item() == 0
    assert overlap(mask("...."), mask("....")).item() == 1


def test_random_sets_overlap_as_the_docstring_says() -> None:
    sets = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(0)) < 0.3
    assert overlap(*sets).item() == pytest.approx(0.3 / (2 - 0.3), abs=0.01)


def test_the_heaviest_pairs_of_every_step() -> None:
    kept = heaviest(IMPORTANCE + torch.tensor([0.03, 0.02, 0.01, 0.0]), 2)
    assert kept.tolist() == [mask(text).tolist() for text in ("xx..", "x..x", "x..x")]
    for budget in (0, 5):
        with pytest.raises(ValueError, match=f"budget={budget}"):
            heaviest(IMPORTANCE, budget)


@torch.no_grad()
def test_importance_equals_eager_attention(random_model: Build) -> None:
    model = random_model()
    ids = torch.randint(0, 64, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    observer = ContextImportance(CONTEXT)
    prefilled = prefill(model, ids[:, :CONTEXT], None)
    continue_from(model, ids[:, CONTEXT:], prefilled.cache, CONTEXT, observer=observer)
    with attention_implementation(model, "eager"):
        attentions = model(input_ids=ids, output_attentions=True).attentions
    assert sorted(observer.importance) == [0, 1]
    for layer, attention in enumerate(attentions):
        grouped = attention[:, :, CONTEXT:, :CONTEXT].view(2, 2, 2, CONTINUATION, CONTEXT).mean(2)
        torch.testing.assert_close(observer.importance[layer], grouped, rtol=1e-4, atol=1e-4)
    kept = [torch.rand(2, 2, CONTEXT, generator=torch.Generator().manual_seed(layer)) < 0.5 for layer in (0, 1)]
    retained = retained_by_layer(observer.importance, kept)
    assert retained.shape == (2, 2, 2, CONTINUATION)
    for layer in (0, 1):
        for step in range(CONTINUATION):
            mass = observer.importance[layer][:, :, step]
            torch.testing.assert_close(retained[layer, :, :, step], (mass * kept[layer]).sum(-1) / mass.sum(-1))


def test_importance_of_bfloat16_states_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 3, 8, generator=generator).bfloat16()
    key = torch.randn(1, 2, 8, 8, generator=generator).bfloat16()
    found = []
    for states in ((query, key), (query.float(), key.float())):
        observer = ContextImportance(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            observer(0, *states, states[1])
        found.append(observer.importance[0])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found)


def test_an_evicted_cache_is_not_observed() -> None:
    with pytest.raises(ValueError, match="held 5 pairs and not the 6"):
        ContextImportance(6)(0, torch.zeros(1, 2, 3, 8), *torch.zeros(2, 1, 2, 8, 8))


def test_masks_of_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers \[0, 2\] but the cache has 2"):
        retained_by_layer({0: IMPORTANCE, 2: IMPORTANCE}, [mask("x..."), mask("x...")])
