"""Bad settings of our presses are refused when the press is made, by a message that names the field and the value."""

import math
import re
from typing import Any

import pytest
from kvpress import AdaKVPress, KnormPress

from sparsekv_pl import presses
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses import (
    AdaptiveBlockDropoutPress,
    AnchorPress,
    BlockDropoutPress,
    EvictionAugPress,
    OraclePress,
    PagePress,
    SentenceDropoutPress,
    SoftThresholdPress,
    SparseRegPress,
    VariableBlockPress,
)

SPANS = [BlockDropoutPress, AdaptiveBlockDropoutPress, VariableBlockPress, SentenceDropoutPress]
RATIOS = [*SPANS, SoftThresholdPress, AnchorPress, OraclePress, PagePress]

CASES: list[tuple[Any, str, Any, dict[str, Any]]] = [
    *((press, "compression_ratio", value, {}) for press in RATIOS for value in (-0.1, 1.0, "0.5")),
    *((SoftThresholdPress, "compression_ratio", value, {}) for value in (1.5, math.nan, None)),
    *((press, name, -1, {}) for press in SPANS for name in ("protect_start", "protect_recent", "seed")),
    (BlockDropoutPress, "block_size", 0, {}),
    (BlockDropoutPress, "block_size", 2.5, {}),
    (BlockDropoutPress, "seed", 0.5, {}),
    (AdaptiveBlockDropoutPress, "block_size", 0, {}),
    (AdaptiveBlockDropoutPress, "window_size", 0, {}),
    (AdaptiveBlockDropoutPress, "sink_tokens", -1, {}),
    (AdaptiveBlockDropoutPress, "temperature", -0.5, {}),
    (AdaptiveBlockDropoutPress, "temperature", math.nan, {}),
    (VariableBlockPress, "shortest", 0, {}),
    (VariableBlockPress, "longest", 15, {"shortest": 16}),
    (SentenceDropoutPress, "max_tokens", 0, {}),
    (SoftThresholdPress, "window_size", 0, {}),
    (SoftThresholdPress, "window_size", math.nan, {}),
    (SoftThresholdPress, "sinks", -1, {}),
    (SoftThresholdPress, "anneal_steps", 0, {}),
    *((SoftThresholdPress, "temperature", value, {}) for value in (0.0, -1.0, math.inf, math.nan)),
    (SoftThresholdPress, "final_temperature", 0.0, {}),
    (SoftThresholdPress, "threshold", math.inf, {}),
    (SoftThresholdPress, "threshold", math.nan, {"learnable": True}),
    (SoftThresholdPress, "learnable", True, {}),
    (SparseRegPress, "kind", "l2", {}),
    *((SparseRegPress, "weight", value, {}) for value in (-0.1, math.inf, math.nan)),
    (SparseRegPress, "window_size", 0, {}),
    (SparseRegPress, "press", "SnapKV", {}),
    (SparseRegPress, "sinks", -1, {}),
    (SparseRegPress, "layers", [], {}),
    (SparseRegPress, "layers", [0, -1], {}),
    (AnchorPress, "press", AdaKVPress(KnormPress()), {}),
    (AnchorPress, "press", None, {}),
    (AnchorPress, "anchors", None, {}),
    (PagePress, "press", AdaKVPress(KnormPress()), {}),
    (PagePress, "page_tokens", 0, {}),
    (PagePress, "sinks", -1, {}),
    (EvictionAugPress, "presses", [], {}),
    (EvictionAugPress, "weights", [1.0, 2.0], {"presses": [KnormPress()]}),
    (EvictionAugPress, "weights", [], {"presses": [KnormPress()]}),
    (EvictionAugPress, "weights", [-1.0], {"presses": [KnormPress()]}),
    (EvictionAugPress, "weights", [0.0], {"presses": [KnormPress()]}),
    (EvictionAugPress, "weights", [math.nan], {"presses": [KnormPress()]}),
]


@pytest.mark.parametrize(
    ("press", "name", "value", "others"), CASES, ids=[f"{p.__name__}-{name}-{v!r}"[:60] for p, name, v, _ in CASES]
)
def test_the_field_and_the_value_are_named(press: Any, name: str, value: Any, others: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as raised:
        press(**others, **{name: value})
    message = str(raised.value)
    assert f"{press.__name__}.{name}" in message
    assert repr(value) in message or value == []
    assert len(re.split(r"[:,;] |must|needs", message)) > 1  # and it goes on to say what to give


def test_every_press_has_a_case() -> None:
    assert {press.__name__ for press, *_ in CASES} == set(presses.__all__)


def test_what_lies_inside_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"anchors\.recent is -1"):
        AnchorPress(anchors=Anchors(recent=-1))
    with pytest.raises(ValueError, match=r"AnchorPress\.press has a compression_ratio of 0\.3"):
        AnchorPress(press=KnormPress(0.3))


def test_a_ratio_set_later_is_checked_where_presses_are_set() -> None:
    for press in (*(made() for made in RATIOS), SparseRegPress(KnormPress()), EvictionAugPress([KnormPress()])):
        for ratio in (-0.1, 1.0, math.nan):
            with pytest.raises(ValueError, match=f"compression_ratio is {ratio}"):
                presses.ratio.set_compression_ratio(press, ratio)
