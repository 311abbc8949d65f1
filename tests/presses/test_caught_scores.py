"""Scores are recorded without side effects, and every press can be named, set and read in the same way."""

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkKVPress,
    ComposedPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyRerotationPress,
    KnormPress,
    PerLayerCompressionPress,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    ThinKPress,
    TOVAPress,
)
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.caught_scores import CaughtScores, catch_scores
from sparsekv_pl.presses.nesting import press_name, presses_in, scorers_in
from tests.random_models import Build

CONTEXT = 24


def prefill(model: PreTrainedModel, press: BasePress) -> DynamicCache:
    cache = DynamicCache()
    ids = torch.randint(0, 64, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    return cache


def caught_from(model: PreTrainedModel, press: BasePress) -> list[CaughtScores]:
    with catch_scores(press) as caught:
        prefill(model, press)
    return caught


def test_presses_and_scorers_inside_are_found() -> None:
    inner = SnapKVPress()
    critical, ada = CriticalKVPress(inner), AdaKVPress(inner)
    assert list(presses_in(ada)) == [ada, inner]
    assert scorers_in(ada) == [inner]
    assert scorers_in(critical) == [critical]  # it scores itself, with the inner one's help
    several = EvictionAugPress([ada, KnormPress(), ComposedPress([critical, ThinKPress()])])
    assert [type(scorer) for scorer in scorers_in(several)] == [SnapKVPress, KnormPress, CriticalKVPress]
    assert scorers_in(SimLayerKVPress()) == []


@pytest.mark.parametrize(
    "press, scorer",
    [
        (KnormPress(0.5), KnormPress),
        (SnapKVPress(0.5, window_size=4), SnapKVPress),
        (AdaKVPress(SnapKVPress(0.5, window_size=4)), SnapKVPress),
        (KeyRerotationPress(ExpectedAttentionPress(0.5)), ExpectedAttentionPress),
        (CriticalKVPress(SnapKVPress(0.5, window_size=4)), CriticalKVPress),
        (ChunkKVPress(TOVAPress(0.5), chunk_length=4), TOVAPress),
        (PerLayerCompressionPress(KnormPress(), [0.3, 0.6]), KnormPress),
    ],
    ids=press_name,
)
def test_every_layer_is_scored_once_and_differentiably(
    random_model: Build, press: BasePress, scorer: type[ScorerPress]
) -> None:
    model = random_model()
    caught = caught_from(model, press)
    assert [scored.layer for scored in caught] == [0, 1]
    for scored in caught:
        assert type(scored.scorer) is scorer
        assert scored.scores.shape == (2, 2, CONTEXT)
    sum(scored.scores.sum() for scored in caught).backward()
    assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "press",
    [SnapKVPress(0.5, window_size=4), AdaKVPress(TOVAPress(0.5)), KeyRerotationPress(KnormPress(0.5))],
    ids=press_name,
)
def test_catching_changes_nothing_about_the_eviction(random_model: Build, press: BasePress) -> None:
    model = random_model()
    plain = [(layer.keys, layer.values) for layer in prefill(model, press).layers]
    with catch_scores(press):
        watched = [(layer.keys, layer.values) for layer in prefill(model, press).layers]
    for pair, expected in zip(watched, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(pair, expected, strict=True))


def test_a_wrapper_that_writes_into_the_scores_gets_a_copy(random_model: Build) -> None:
    """AdaKVPress sets safeguarded scores to the largest float."""
    caught = caught_from(random_model(), AdaKVPress(SnapKVPress(0.5, window_size=4)))
    assert all(scored.scores.max() < 3 for scored in caught)


def test_nothing_is_left_behind_even_after_an_exception(random_model: Build) -> None:
    press = AdaKVPress(SnapKVPress(0.5, window_size=4))
    before = dict(vars(press.press))
    class_score = SnapKVPress.score
    with pytest.raises(RuntimeError, match="inside"), catch_scores(press):
        assert "score" in vars(press.press)
        raise RuntimeError("inside")
    assert vars(press.press) == before
    assert SnapKVPress.score is class_score
    with catch_scores(press) as caught:
        pass
    prefill(random_model(), press)
    assert caught == []
