"""A press as text: read back it is the same press, and nothing in the text is run."""

from typing import Any

import kvpress
import pytest
import torch
from kvpress import BasePress, ComposedPress, KeyDiffPress, KeyRerotationPress, KnormPress, SnapKVPress

from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses import AnchorPress, SoftThresholdPress
from sparsekv_pl.presses.press_text import press_from, press_text
from sparsekv_pl.storage.result_keys import settings_of
from tests.presses.test_traits import ROWS


@pytest.mark.parametrize(
    "text, press",
    [
        ("KeyDiff", KeyDiffPress()),
        (" KeyDiffPress ", KeyDiffPress()),
        ("SnapKV(0.5, window_size=32)", SnapKVPress(0.5, 32)),
        ("KeyRerotation(KeyDiff(0.75))", KeyRerotationPress(KeyDiffPress(0.75))),
        ("Anchor(Knorm, compression_ratio=0.5)", AnchorPress(0.5, KnormPress())),
        ("Anchor(0.5, Knorm, Anchors(sinks=2))", AnchorPress(0.5, KnormPress(), Anchors(sinks=2))),
        ("Composed([Knorm(0.5), SnapKV])", ComposedPress([KnormPress(0.5), SnapKVPress()])),
        ("CriticalKV(SnapKV(0.5))", kvpress.CriticalKVPress(SnapKVPress(0.5))),
    ],
)
def test_names_are_those_of_reports(text: str, press: BasePress) -> None:
    assert settings_of(press_from(text)) == settings_of(press)


def test_every_press_is_read_back_or_says_what_no_text_can_say() -> None:
    written = 0
    for press, *_ in ROWS:
        try:
            text = press_text(press)
        except ValueError as error:
            assert "no text can say" in str(error)
            continue
        assert settings_of(press_from(text)) == settings_of(press)
        written += 1
    assert written > len(ROWS) - 3


def test_a_learned_threshold_is_not_lost_silently() -> None:
    press: Any = SoftThresholdPress(0.5)
    press.threshold = torch.nn.Parameter(torch.tensor(0.1))
    with pytest.raises(ValueError, match="learned parameter"):
        press_text(press)


@pytest.mark.parametrize(
    "text, message",
    [
        ("KeyDif", "there is no press 'KeyDif': take one of .*KeyDiff"),
        ("KeyDiff(ratio=0.5)", "unexpected keyword argument 'ratio'"),
        ("KeyDiff(1.5)", "ompression ratio"),
        ("SnapKV(window_size=open('x'))", "there is no press 'open'"),
        ("__import__('os').system('true')", "no press|malformed"),
        ("SnapKV(**{})", "SnapKVPress takes compression_ratio"),
        ("KeyDiff(0.5, 1)", "KeyDiffPress takes compression_ratio"),
        ("KeyDiff KeyDiff", "cannot be read: write KeyDiff"),
        ("0.5", "is no press: write KeyDiff"),
        ("(" * 500, "cannot be read|is no press"),
        ("", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        press_from(text)
    assert "\n" not in str(error.value)
