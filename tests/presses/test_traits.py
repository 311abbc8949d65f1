"""The traits of every press of kvpress and of this project, one row each."""

from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from kvpress import BasePress, ScorerPress, SnapKVPress

from sparsekv_pl import presses
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.request import Request
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
from sparsekv_pl.presses.key_tokens import ReadsTokens
from sparsekv_pl.presses.position_order import InOrderPress
from sparsekv_pl.presses.traits import table, traits_of

LETTERS = {
    "S": "by_scores",
    "T": "trainable",
    "C": "works_in_chunks",
    "D": "evicts_while_decoding",
    "Q": "takes_a_ratio",
    "P": "replayable",
    "K": "attention_free",  # keys, values and positions alone
    "=": "same_at_every_ratio",
    "I": "in_order",
    "E": "only_trains",  # everything stays in evaluation
    "H": "head_wise",
    "1": "first_row_decides",
    "R": "re_rotates",
    "O": "order_only",
    "L": "adds_losses",
    "W": "reads_tokens",
    "?": "needs_question",
    "G": "while_generating",
}
KNORM = kvpress.KnormPress()
ROWS: list[tuple[BasePress, str, str, int]] = [  # a press, its letters, its needs, its window
    (kvpress.BasePress(), "P", "hidden states", 0),
    (kvpress.ScorerPress(), "STCDQP", "hidden states", 0),
    (kvpress.AdaKVPress(KNORM), "TQPKH", "", 0),
    (kvpress.BlockPress(KNORM), "TQPK", "", 0),
    (kvpress.CAMPress(KNORM), "TCG", "whole queries", 0),
    (kvpress.CapPress(), "STCDQP", "rotary, whole queries", 4),
    (kvpress.ChunkKVPress(KNORM), "TCQPK1", "", 0),
    (kvpress.ChunkPress(KNORM), "TQPK", "", 0),
    (kvpress.CompactorPress(), "STQP", "whole queries, keys", 0),
    (kvpress.ComposedPress([KNORM]), "TCPK", "", 0),
    (kvpress.CompressionRatioDecodingPress(KNORM), "TCKG", "", 0),
    (kvpress.CriticalAdaKVPress(KNORM), "TQPH1", "weights", 0),
    (kvpress.CriticalKVPress(KNORM), "STCDQP", "weights", 0),
    (kvpress.CURPress(), "STCDQPK", "", 0),
    (kvpress.DecodingPress(KNORM), "TCKG", "", 0),
    (kvpress.DMSPress(KNORM), "TPKH", "", 0),
    (kvpress.DuoAttentionPress(), "PKH", "", 0),
    (kvpress.EntropyGatedChunkKVPress(KNORM), "TCQPK1", "", 0),
    (kvpress.ExpectedAttentionPress(), "STCDQP=", "rotary, whole queries", 4),
    (kvpress.ExpectedAttentionStatsPress(), "STCDQP", "rotary, whole queries", 4),
    (kvpress.FastKVzipPress(), "QH", "hidden states", 4096),
    (kvpress.FinchPress(), "QR?", "whole queries", 0),
    (kvpress.FinchPress(rerotate_keys=False), "Q?", "whole queries", 0),
    (kvpress.KeyDiffPress(), "STCDQPK=", "", 0),
    (kvpress.KeyRerotationPress(KNORM), "STCQPKIR", "", 0),
    (kvpress.KnormPress(), "STCDQPK=", "", 0),
    (kvpress.KVComposePress(), "Q", "attention", 0),
    (kvpress.KVgradPress(), "QH1", "whole queries, weights", 4),
    (kvpress.KVzapPress(), "STCDQP", "hidden states", 0),
    (kvpress.KVzipPress(), "QH1", "whole queries, weights", 4),
    (kvpress.LagKVPress(), "SCDQPK=O", "", 4),
    (kvpress.LagKVPress(cross_scoring=True), "STCDQPK=O", "", 4),
    (kvpress.LeverageScorePress(), "STQP", "keys", 0),
    (kvpress.LUKVPress(), "TQPH", "", 4),
    (kvpress.MergingPress(KNORM), "STCQPK", "", 0),
    (kvpress.NonCausalAttnPress(), "STQP", "whole queries", 0),
    (kvpress.ObservedAttentionPress(), "STCQP", "attention", 0),
    (kvpress.PerLayerCompressionPress(KNORM, [0.5]), "TCPK", "", 0),
    (kvpress.PrefillDecodingPress(), "CKG", "", 0),
    (kvpress.PyramidKVPress(), "STDQP=", "whole queries", 64),
    (kvpress.QFilterPress(), "STCDQPK", "", 0),
    (kvpress.RandomPress(), "SCDQPK", "", 0),
    (kvpress.RestoreKVPress(), "QH1", "whole queries, weights", 4),
    (kvpress.SimLayerKVPress(), "CP", "whole queries", 0),
    (SnapKVPress(), "STCDQP=", "whole queries", 64),
    (kvpress.StreamingLLMPress(), "SCDQPK", "", 4),
    (kvpress.ThinKPress(), "CP", "whole queries", 32),
    (kvpress.TOVAPress(), "STCDQP=", "whole queries", 0),
    (AdaptiveBlockDropoutPress(), "SCDQPIE", "queries", 32),
    (AnchorPress(), "STCDQPKIW", "", 0),
    (BlockDropoutPress(), "SCDQPKIE", "", 0),
    (EvictionAugPress([KNORM]), "STCQK", "", 0),
    (OraclePress(), "SQP", "continuation", 0),
    (PagePress(), "STCQPKI", "", 0),
    (SentenceDropoutPress(), "SCDQPKIEW", "", 0),
    (SoftThresholdPress(), "STDQPI", "queries", 32),
    (SparseRegPress(), "CQEL", "queries", 64),
    (SparseRegPress(press=KNORM), "STCQL", "queries", 64),
    (VariableBlockPress(), "SCDQPKIE", "", 0),
]
NESTED: list[tuple[BasePress, str, str, int]] = [
    (kvpress.AdaKVPress(SnapKVPress(window_size=7)), "TQPH", "", 7),
    (kvpress.CriticalKVPress(SnapKVPress(window_size=6)), "STCDQP", "weights", 6),
    (kvpress.CriticalKVPress(kvpress.RandomPress()), "STCDQP", "weights", 0),
    (kvpress.AdaKVPress(kvpress.RandomPress()), "QPKH", "", 0),
    (kvpress.AdaKVPress(AnchorPress(press=kvpress.RandomPress())), "QPKHW", "", 0),
    (kvpress.KeyRerotationPress(BlockDropoutPress()), "SCQPKIER", "", 0),
    (AnchorPress(press=SnapKVPress(window_size=5)), "STCDQPIW", "", 5),
    (kvpress.KeyRerotationPress(PagePress(press=SnapKVPress(window_size=5))), "STCQPIR", "", 5),
    (PagePress(press=kvpress.RandomPress()), "SCQPKI", "", 0),
    (EvictionAugPress([kvpress.AdaKVPress(SnapKVPress(window_size=9)), kvpress.RandomPress()]), "TQH", "", 9),
    (EvictionAugPress([kvpress.KeyRerotationPress(KNORM), kvpress.FinchPress()]), "TQR?", "", 0),
    (EvictionAugPress([BlockDropoutPress(), SparseRegPress()]), "CQEL", "", 64),
    (EvictionAugPress([kvpress.ChunkKVPress(KNORM), kvpress.ThinKPress()]), "TC1", "", 32),
    (SparseRegPress(press=kvpress.KeyRerotationPress(KNORM)), "STCQRL", "queries", 64),
    (SparseRegPress(press=SentenceDropoutPress()), "SCQELW", "queries", 64),
    (kvpress.ComposedPress([SnapKVPress(), kvpress.ThinKPress()]), "TCP", "", 64),
]


@pytest.mark.parametrize("press, letters, needs, window", ROWS + NESTED, ids=lambda given: given and str(given)[:60])
def test_what_every_press_is_taken_for(press: BasePress, letters: str, needs: str, window: int) -> None:
    traits = traits_of(press)
    found = [letter for letter, name in LETTERS.items() if getattr(traits, name)]
    assert ("".join(found), ", ".join(traits.needs), traits.window) == (letters, needs, window)


def test_no_press_is_without_a_row() -> None:
    """A press that kvpress adds needs a row, here and in the library, before it can be used."""
    named = [getattr(package, name) for package in (kvpress, presses) for name in package.__all__]
    known = {kind for kind in named if isinstance(kind, type) and issubclass(kind, BasePress)}
    assert known == {type(press) for press, *_ in ROWS}
    assert known <= set(table())
    assert {kind.__name__ for kind in set(table()) - known} == {"InOrderPress", "SpanDropoutPress"}


def test_traits_cannot_be_changed_and_are_those_of_the_moment() -> None:
    press = SnapKVPress(window_size=5)
    before = traits_of(press)
    press.window_size = 9
    assert (before.window, traits_of(press).window) == (5, 9)
    with pytest.raises(AttributeError):
        before.window = 3  # type: ignore[misc]


def test_selections_say_where_only_the_order_of_scores_means_something(random_model: Callable[..., Any]) -> None:
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    press = EvictionAugPress([kvpress.LagKVPress(0.5, lag_size=4), kvpress.KnormPress(0.5)], score_all=True)
    selections = prefill(random_model(), ids, press, request=Request(scores=True)).selections
    assert {(selection.press, selection.order_only) for selection in selections} == {("LagKV", True), ("Knorm", False)}


# --- presses from outside the table ---


class OwnRule(BasePress):
    """A press about which nothing is known."""


class OwnScores(ScorerPress):
    """A scorer as in the notebook."""

    def score(self, module: Any, hidden_states: Any, keys: torch.Tensor, *_: Any) -> torch.Tensor:  # noqa: ARG002
        return keys.norm(dim=-1)


class OwnSnap(SnapKVPress):
    """Its scores may depend on the ratio."""


class StatesDifference(SnapKVPress):
    """States in one line what differs."""

    traits = {"order_only": True, "works_in_chunks": False}  # noqa: RUF012


class Inherits(StatesDifference):
    """Inherits its base's difference."""


class ReadsTokensInOrder(ReadsTokens, InOrderPress):
    """Combines two base classes of this project."""


def test_a_press_from_outside_has_its_bases_traits_and_what_it_says() -> None:
    unknown, scores = traits_of(OwnRule()), traits_of(OwnScores())
    assert not (unknown.works_in_chunks or unknown.by_scores or unknown.trainable or unknown.takes_a_ratio)
    assert scores.works_in_chunks and scores.by_scores and scores.trainable and scores.takes_a_ratio
    assert not (unknown.attention_free or scores.attention_free)  # unknown
    snap = traits_of(OwnSnap(window_size=3))
    assert snap.needs == ("whole queries",) and snap.window == 3
    assert not snap.same_at_every_ratio
    for press in (StatesDifference(), Inherits()):
        assert traits_of(press).order_only and not traits_of(press).works_in_chunks
    both = traits_of(ReadsTokensInOrder())
    assert both.reads_tokens and both.in_order
    with pytest.raises(TypeError, match="order_onyl"):
        traits_of(type("Misspelt", (SnapKVPress,), {"traits": {"order_onyl": True}})())


def test_a_press_of_kvpress_without_a_row_is_refused_by_name() -> None:
    new = type("NewPress", (SnapKVPress,), {"__module__": "kvpress.presses.new_press"})
    for press in (new(), kvpress.AdaKVPress(new()), type("Mine", (new,), {})()):
        with pytest.raises(ValueError, match=r"NewPress is a press of kvpress that sparsekv_pl does not know"):
            traits_of(press)


# --- who decides ---


def test_the_deciding_press_of_every_step_is_a_candidate() -> None:
    knorm, snapkv = kvpress.KnormPress(), SnapKVPress()
    press = EvictionAugPress([SparseRegPress(press=knorm), EvictionAugPress([snapkv], seed=1)])
    traits, drawn = traits_of(press), []
    for step in range(20):
        press.draw(step)
        drawn.append(traits.deciding.press)
    assert [id(candidate.press) for candidate in traits.candidates] == [id(knorm), id(snapkv)]
    assert {id(decided) for decided in drawn} == {id(knorm), id(snapkv)}
    assert [member.name for member in traits.members] == ["SparseReg(Knorm)", "EvictionAug(SnapKV)"]
    assert traits_of(SparseRegPress()).candidates[0].name == traits_of(SparseRegPress()).members[0].name == "SparseReg"


def test_the_scorer_that_selects() -> None:
    ada = kvpress.AdaKVPress(KNORM)
    for press, selects in ((KNORM, KNORM), (kvpress.KeyRerotationPress(KNORM), KNORM), (ada, ada)):
        assert traits_of(press).selecting is selects
