"""docs/serve.md says of every press whether a paged engine can run it, as the press traits do."""

import re
from pathlib import Path

import pytest
from kvpress import BasePress, KeyDiffPress, PerLayerCompressionPress, ScorerPress

from sparsekv_pl.presses.position_order import InOrderPress
from sparsekv_pl.presses.span_dropout import SpanDropoutPress
from sparsekv_pl.presses.traits import table, traits_of

PAGE = (Path(__file__).parents[2] / "docs/serve.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| (cannot: [^|]*|can)", PAGE.partition("## Under a paged engine")[2], re.MULTILINE)
SAID = {name: verdict.strip() for names, verdict in ROWS for name in names.split(", ")}
NO_KIND = {BasePress, ScorerPress, InOrderPress, SpanDropoutPress}


def made(kind: type) -> BasePress:
    if kind is PerLayerCompressionPress:
        return kind(KeyDiffPress(), [0.5])
    for given in ((), (KeyDiffPress(0.5),), ([KeyDiffPress(0.5)],)):
        try:
            press = kind(*given)
            traits_of(press)
            return press
        except (TypeError, AssertionError, AttributeError, ValueError):
            continue
    raise AssertionError(f"no {kind.__name__} was made")


def served() -> dict[str, BasePress]:
    """The presses that evict a prompt in use: not while generating, not in training alone."""
    presses = {kind.__name__.removesuffix("Press"): made(kind) for kind in table() if kind not in NO_KIND}
    left_out = {
        name
        for name, press in presses.items()
        if traits_of(press).deciding.only_trains
        or traits_of(press).foresees
        or traits_of(press).decides == "drawn"
        or (traits_of(press).while_generating and name != "CAM")
    }
    return {name: press for name, press in presses.items() if name not in left_out}


@pytest.mark.filterwarnings("ignore")
def test_the_page_says_of_every_press_what_its_traits_say() -> None:
    presses = served()
    assert SAID.keys() == presses.keys()
    for name, press in presses.items():
        traits = traits_of(press)
        runs = traits.attention_free and traits.works_in_chunks and not traits.head_wise and traits.takes_a_ratio
        assert SAID[name].startswith("cannot") != runs, name
        reason = SAID[name].partition(": ")[2]
        if reason == "they look at a whole context":
            assert traits.attention_free and not traits.works_in_chunks
        elif reason == "heads keep different pairs":
            assert traits.head_wise
        elif reason == "layers keep different numbers":
            assert traits.attention_free and not traits.takes_a_ratio
        elif reason == "they need queries":
            assert any("queries" in need for part in traits.parts for need in part.needs)
        elif reason:
            assert not traits.attention_free
