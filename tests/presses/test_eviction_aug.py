"""One press per step: the draw is reproducible and fair, and the press drawn is the one that evicts."""

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.step_draws import draw
from sparsekv_pl.presses.traits import traits_of
from tests.random_models import Build

CONTEXT = 24


def context() -> Tensor:
    return torch.randint(0, 64, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


def presses(ratio: float = 0.5) -> list[BasePress]:
    return [KnormPress(ratio), SnapKVPress(ratio, window_size=4), StreamingLLMPress(ratio)]


@torch.no_grad()
def evicted(model: PreTrainedModel, press: BasePress) -> list[Tensor]:
    """As kvpress's pipeline uses a press: every layer's keys after a prefill."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=context(), past_key_values=cache)
    return [layer.keys for layer in cache.layers]


def test_the_draw_is_a_function_of_seed_and_step() -> None:
    def draws(seed: int) -> list[int]:
        press = EvictionAugPress(presses(), seed=seed)
        return [(press.draw(step), press.drawn)[1] for step in range(50)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)
    press = EvictionAugPress(presses())
    press.draw(49)
    again = press.draw(7)
    assert again is press.press is press.presses[draws(0)[7]]  # whatever was drawn before


def test_the_draw_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    EvictionAugPress(presses()).draw(3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("weights", "odds"), [([6, 2, 0], [0.75, 0.25, 0]), (None, [1 / 3] * 3)])
def test_weights_are_relative_odds(weights: list[float] | None, odds: list[float]) -> None:
    press = EvictionAugPress(presses(), weights=weights)
    drawn = [(press.draw(step), press.drawn)[1] for step in range(2000)]
    assert [drawn.count(i) / 2000 for i in range(3)] == pytest.approx(odds, rel=0, abs=0.045)
    assert weights is None or 2 not in drawn


def test_setting_the_ratio_sets_it_for_all_and_reading_it_reads_the_drawn_one() -> None:
    press = EvictionAugPress([KnormPress(0.1), AdaKVPress(SnapKVPress(0.2))])
    press.drawn = 1
    assert press.compression_ratio == 0.2
    press.compression_ratio = 0.4
    assert [member.compression_ratio for member in press.presses] == [0.4, 0.4]
    with pytest.raises(ValueError, match=r"compression_ratio is 1\.0"):
        press.compression_ratio = 1.0


@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize("score_all", [False, True])
def test_every_layer_is_evicted_by_the_drawn_press_alone(random_model: Build, drawn: int, score_all: bool) -> None:
    model, press = random_model(), EvictionAugPress(presses(), score_all=score_all)
    press.drawn = drawn
    for keys, expected in zip(evicted(model, press), evicted(model, presses()[drawn]), strict=True):
        assert keys.shape[2] == CONTEXT // 2
        assert torch.equal(keys, expected)


def test_scores_of_all_are_those_each_would_give_alone(random_model: Build) -> None:
    model, press = random_model(), EvictionAugPress(presses(), score_all=True)
    press.drawn = 2
    with catch_scores(press) as caught:
        evicted(model, press)
    assert sorted((scored.layer, press.presses.index(scored.scorer)) for scored in caught) == [
        (layer, member) for layer in range(2) for member in range(3)
    ]
    for index, alone in enumerate(presses()):
        with catch_scores(alone) as expected:
            evicted(model, alone)
        own = [scored.scores for scored in caught if scored.scorer is press.presses[index]]
        # Layer 1 too: a prefill's hidden states do not depend on what the layer below evicted.
        torch.testing.assert_close(own, [scored.scores for scored in expected])


def test_without_score_all_the_drawn_press_scores_alone(random_model: Build) -> None:
    press = EvictionAugPress(presses())
    with catch_scores(press) as caught:
        evicted(random_model(), press)
    assert [scored.scorer for scored in caught] == [press.presses[0]] * 2


def test_at_ratio_0_everything_stays_and_the_others_still_score(random_model: Build) -> None:
    model, press = random_model(), EvictionAugPress(presses(0.0), score_all=True)
    with catch_scores(press) as caught:
        keys = evicted(model, press)
    assert [scored.scorer for scored in caught] == press.presses[1:] * 2
    assert [layer.shape[2] for layer in keys] == [CONTEXT, CONTEXT]


def test_hooks_are_gone_afterwards(random_model: Build) -> None:
    model, press = random_model(), EvictionAugPress(presses(), score_all=True)
    with pytest.raises(RuntimeError, match="inside"), press(model):
        raise RuntimeError("inside")
    assert not any(module._forward_hooks for module in model.modules())


def test_one_inside_another_draws_by_itself() -> None:
    with pytest.raises(ValueError, match=r"EvictionAugPress\.seed is 0, as is that of"):
        EvictionAugPress([KnormPress(), AdaKVPress(KnormPress()), EvictionAugPress(presses())])
    press = EvictionAugPress([KnormPress(), EvictionAugPress([SnapKVPress(), StreamingLLMPress()], seed=1)])
    drawn = set()
    for step in range(40):
        draw(press, step)
        drawn.add(type(traits_of(press).deciding.press))
    assert drawn == {KnormPress, SnapKVPress, StreamingLLMPress}


def test_before_the_first_draw_it_is_a_press_that_can_be_drawn() -> None:
    assert EvictionAugPress(presses(), weights=[0, 0, 1]).press == presses()[2]


def test_what_is_no_press_is_named() -> None:
    with pytest.raises(ValueError, match="'SnapKV', which is no press"):
        EvictionAugPress(["SnapKV"])


def test_scorers_in_wrappers_score_too(random_model: Build) -> None:
    press = EvictionAugPress([KnormPress(0.5), KeyRerotationPress(KeyDiffPress(0.5))], score_all=True)
    with catch_scores(press) as caught:
        evicted(random_model(), press)
    assert {type(scored.scorer) for scored in caught} == {KnormPress, KeyDiffPress}
