"""SparseRegPress.layers names layers that presses evict from: in others, nothing would be measured."""

import re
from collections.abc import Callable

import pytest
from kvpress import BasePress, ComposedPress, KnormPress
from transformers import PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.models.layer_kinds import evicted_layers, layers_left_alone
from sparsekv_pl.presses import EvictionAugPress, SparseRegPress
from tests.windowed_models import ids, windowed_model

AROUND: dict[str, Callable[[SparseRegPress], BasePress]] = {
    "alone": lambda press: press,
    "composed": lambda press: ComposedPress([press, KnormPress(0.2)]),
    "one of several": lambda press: EvictionAugPress([press, KnormPress(0.5)]),
}


def measured(model: PreTrainedModel, press: BasePress) -> int:
    press_context = prefill(model.train(), ids(24), press).press_context
    assert press_context is not None
    return len(press_context.losses.get("entropy", []))


@pytest.mark.parametrize("around", AROUND)
def test_a_layer_in_which_nothing_is_measured_is_named(around: str) -> None:
    model = windowed_model("gemma3")
    evicted, others = evicted_layers(model.config), layers_left_alone(model.config)
    assert evicted and others
    for layers, wrong in ((others, others), ([evicted[0], others[0]], others[:1]), ([evicted[0], 99], [99])):
        press = AROUND[around](SparseRegPress(KnormPress(0.5), window_size=8, layers=layers))
        says = re.escape(f"layers={layers}: presses evict from layers {', '.join(map(str, evicted))} of this model, ")
        says += f"and nothing is measured in {', '.join(map(str, wrong))}: "
        for refused in (lambda press=press: check_press(model, press), lambda press=press: measured(model, press)):
            with pytest.raises(ValueError, match=says) as error:
                refused()
            assert "\n" not in str(error.value)
    whole = AROUND[around](SparseRegPress(KnormPress(0.5), window_size=8, layers=evicted[:1]))
    check_press(model, whole)
    assert measured(model, whole) == 1
