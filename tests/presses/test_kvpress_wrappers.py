"""Our presses that are no scorers, inside every press of kvpress's that wraps one: they evict, or refuse by name."""

import inspect
from typing import Any

import kvpress
import pytest
import torch
from kvpress import BasePress, ComposedPress, DecodingPress, KnormPress, PrefillDecodingPress, SnapKVPress
from transformers import DynamicCache

from sparsekv_pl.cli.config_values import explained
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.step_draws import draw
from tests.presses.press_bench import model_of

INNER = {
    "EvictionAugPress": lambda: EvictionAugPress([KnormPress(0.5), SnapKVPress(0.5, window_size=8)], score_all=True),
    "SparseRegPress": lambda: SparseRegPress(KnormPress(0.5)),
}
HOLDS = ("press", "presses", "base_press", "prefilling_press")
WRAPPERS = {
    name: (made, next(field for field in HOLDS if field in inspect.signature(made).parameters))
    for name, made in vars(kvpress).items()
    if inspect.isclass(made) and issubclass(made, BasePress) and set(HOLDS) & set(inspect.signature(made).parameters)
}
EVICT = {"ComposedPress", "PrefillDecodingPress"}
"""Wrappers that let the inner press evict; the others need its scores."""


def inside(wrapper: str, inner: BasePress) -> BasePress:
    made, field = WRAPPERS[wrapper]
    more: dict[str, Any] = {"compression_ratios": [0.5, 0.5]} if wrapper == "PerLayerCompressionPress" else {}
    wrapped: BasePress = explained(made, **({field: [inner] if field == "presses" else inner} | more))
    return wrapped


def kept(press: BasePress) -> list[int]:
    """Pairs per layer and KV head that a forward of 64 tokens leaves."""
    model, cache = model_of("llama").eval(), DynamicCache()
    ids = torch.randint(2, 1024, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    return [layer.keys.shape[2] for layer in cache.layers]


def test_all_wrappers_are_looked_at() -> None:
    assert set(WRAPPERS) > EVICT
    assert len(WRAPPERS) >= 10


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_it_evicts_or_is_refused_by_name(wrapper: str, inner: str) -> None:
    if wrapper in EVICT:
        assert kept(inside(wrapper, INNER[inner]())) == [32, 32]
        return
    refusal = rf"{wrapper}\(.*{inner}.* is refused: .+|{inner} has no scores of its own"
    with pytest.raises(ValueError, match=refusal):
        kept(inside(wrapper, INNER[inner]()))


@pytest.mark.parametrize("inner", INNER)
def test_one_after_another_and_before_decoding(inner: str) -> None:
    press = INNER[inner]()
    assert kept(ComposedPress([KnormPress(0.5), press])) == [16, 16]
    assert kept(ComposedPress([press, KnormPress(0.5)])) == [16, 16]
    both = PrefillDecodingPress(press, DecodingPress(KnormPress(), compression_interval=8, target_size=16))
    assert kept(both) == [32, 32]


def test_the_press_of_the_step_evicts_inside_a_wrapper() -> None:
    """The two presses differ in their ratios; the two steps draw different presses."""
    augmented = EvictionAugPress([KnormPress(0.5), KnormPress(0.75)])
    found = set()
    for step in range(8):
        draw(augmented, step)
        found.add(kept(ComposedPress([augmented]))[0])
    assert found == {32, 16}
