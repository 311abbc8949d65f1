"""Press traits: everything the project has to know about each kind of press, in one table with a row per kind.

A new press is one file and one row. A press without a row has that of its nearest base class, and states differences in
a class attribute: ``traits = {"works_in_chunks": False}``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, Literal

import kvpress
from kvpress import BasePress, ScorerPress

from sparsekv_pl.presses.key_tokens import ReadsTokens
from sparsekv_pl.presses.nesting import press_name, wrapped
from sparsekv_pl.presses.position_order import InOrderPress

Need = Literal["queries", "whole queries", "keys", "rotary", "weights", "hidden states", "attention", "continuation"]
"""Inputs of a press besides the cache and positions: queries computed from q_proj and RoPE (``whole``: RoPE must rotate
all their dimensions), keys computed from k_proj and RoPE, the model's RoPE (rotary_emb) at later positions, the output
projection, hidden states, attention weights, the attention that the continuation will pay."""


@dataclass(frozen=True)
class PressTraits:
    """The traits of one press, with its settings and the presses that it wraps. The defaults suit an unknown press.

    "Any" and "all" below refer to the press itself and every press inside it.
    """

    needs: tuple[Need, ...] = ()
    """Inputs of this press alone, see ``Need``."""
    by_scores: bool = False
    """Keeps the keys with the highest scores of one scorer, per head; for a mix of presses, every member does."""
    trainable: bool = False
    """Any has scores that depend differentiably on the model."""
    order_only: bool = False
    """Its scores are not negative, but only their order has a meaning."""
    works_in_chunks: bool = False
    """All may evict after each of several chunks of a context."""
    evicts_while_decoding: bool = False
    """All may evict while tokens are decoded (kvpress's DecodingPress)."""
    head_wise: bool = False
    """Any hides pairs per head and leaves them in memory."""
    first_row_decides: bool = False
    """Any evicts from one row alone: in a batch it keeps what the first row's scores select, mixes rows or fails."""
    re_rotates: bool = False
    """Any moves the kept keys to positions 0..budget-1, so that later tokens continue from the cache's length."""
    in_order: bool = False
    """It leaves the cache in the order of positions."""
    same_at_every_ratio: bool = False
    """Its scores depend only on a dense prefill and its settings. Never inherited by a subclass without a row."""
    only_trains: bool = False
    """It, or all inside it, keep everything in evaluation."""
    adds_losses: bool = False
    """Any adds a loss term to the objective's."""
    takes_a_ratio: bool = True
    """Its compression_ratio can be set, possibly by setting that of all inside."""
    decides: Literal["itself", "drawn", "inside"] = "itself"
    """Which press selects: this one, the inner press drawn for the step, or the inner press."""
    attends: Literal["", "window", "expected", "by itself"] = ""
    """Attention that this press computes without the model: the last queries' or ExpectedAttention's, which follow the
    model's rule (presses/scores_by_rule.py), or another, which is refused where the model's is not the usual."""
    shared_work: Literal["", "mean rotation", "factorisation"] = ""
    """The part of its work that presses/shared_work.py replaces."""
    reads_tokens: bool = False
    """Any reads token ids."""
    needs_question: bool = False
    """Any selects by the question, which must stand at the end of the context."""
    while_generating: bool = False
    """Any evicts while tokens are generated, by settings of its own (kvpress's DecodingPress and its kin)."""
    every_layer: bool = False
    """It spreads its budget over all layers, walks through all, or begins a context in layer 0."""
    replayable: bool = False
    """All only read layers that have run; none runs the model itself (KVzipPress)."""
    window: int = 0
    """Largest number of tokens that one observes or keeps by rule (window_size, n_sink); chunks must be longer."""
    part_tokens: int = 0
    """Least number of tokens of which one scores a longer context's parts (chunk_length, block_size); 0: none does."""
    press: BasePress = None  # rows of the table have no press
    """The press that these traits were made from."""
    inside: tuple["PressTraits", ...] = ()
    """The traits of the presses that it wraps."""

    @property
    def name(self) -> str:
        """The press's name in reports, see ``press_name``."""
        return press_name(self.press)

    @cached_property
    def parts(self) -> tuple["PressTraits", ...]:
        """These traits and those of every press inside, outermost first."""
        return (self, *(part for inner in self.inside for part in inner.parts))

    @property
    def attention_free(self) -> bool:
        """Whether all select by the cache and positions alone, so that a paged inference engine can run them."""
        return not any(part.needs for part in self.parts)

    @property
    def foresees(self) -> bool:
        """Whether any sees the continuation, which is known in an evaluation of cases alone."""
        return any("continuation" in part.needs for part in self.parts)

    @property
    def members(self) -> tuple["PressTraits", ...]:
        """The traits of the presses of which one is drawn at every step; else these traits alone."""
        return self.inside if self.decides == "drawn" else (self,)

    @property
    def candidates(self) -> tuple["PressTraits", ...]:
        """The traits of every press that may select."""
        if self.decides == "itself" or not self.inside:
            return (self,)
        return tuple(candidate for inner in self.inside for candidate in inner.candidates)

    @property
    def deciding(self) -> "PressTraits":
        """The traits of the candidate that selects at this step."""
        if self.decides == "itself" or not self.inside:
            return self
        now: Any = self.press
        chosen = next((inner for inner in self.inside if inner.press is now.press), None)
        assert chosen is not None
        return chosen.deciding

    @property
    def selecting(self) -> BasePress:
        """The scorer whose scores select, if ``by_scores``; else the press itself."""
        return self.press if isinstance(self.press, ScorerPress) or not self.by_scores else self.inside[0].press


def traits_of(press: BasePress) -> PressTraits:
    """Return the traits of ``press`` with its present settings.

    Raises
    ------
    ValueError
        For a kvpress press, itself or inside, without a row: its behaviour is unknown.
    """
    own, inside = _own(press), tuple(traits_of(inner) for inner in wrapped(press))
    together = (own, *inside)
    marks = ["trainable", "head_wise", "first_row_decides", "re_rotates", "adds_losses", "reads_tokens"]
    marks += ["needs_question", "while_generating"]
    abilities = ("works_in_chunks", "evicts_while_decoding", "replayable")
    joined: dict[str, Any] = {name: any(getattr(one, name) for one in together) for name in marks}
    joined |= {name: all(getattr(one, name) for one in together) for name in abilities}
    chosen = inside if own.decides != "itself" and inside else (own,)
    return replace(
        own,
        **joined,
        takes_a_ratio=own.takes_a_ratio
        and ("compression_ratio" in vars(press) or all(one.takes_a_ratio for one in inside)),
        by_scores=all(one.by_scores for one in chosen),
        only_trains=all(one.only_trains for one in inside or (own,)),
        window=max(one.window for one in together),
        part_tokens=min((one.part_tokens for one in together if one.part_tokens), default=0),
        press=press,
        inside=inside,
    )


def _own(press: BasePress) -> PressTraits:
    """Return the row of ``press``, with the traits that follow from the object itself."""
    kind = type(press)
    row = _row(press, kind)
    has_ratio = "compression_ratio" in vars(press) or hasattr(kind, "compression_ratio")
    return replace(
        row,
        takes_a_ratio=row.takes_a_ratio and has_ratio,
        reads_tokens=isinstance(press, ReadsTokens),
        replayable=kind.__call__ is BasePress.__call__,
        window=max(int(getattr(press, name, None) or 0) for name in ("window_size", "n_sink")),
    )


def _row(press: BasePress, kind: type) -> PressTraits:
    """Return the row of ``kind``, or that of its nearest base class with the differences of its ``traits``."""
    found = table().get(kind)
    if found is not None:
        return found(press) if callable(found) else found
    if kind.__module__.partition(".")[0] == "kvpress":
        raise ValueError(
            f"{kind.__name__} is a press of kvpress that sparsekv_pl does not know: take another, or add its row to "
            "presses/traits.py"
        )
    base = next((each for each in kind.__bases__ if issubclass(each, BasePress)), BasePress)
    differs: Mapping[str, Any] = {"same_at_every_ratio": False} | vars(kind).get("traits", {})
    return replace(_row(press, base), **differs)


Row = PressTraits | Callable[[Any], PressTraits]
"""The traits of a kind, or a function that makes them from a press's settings."""


@cache
def table() -> dict[type, Row]:
    """Return a row for every press of kvpress and of this project."""
    from sparsekv_pl import presses  # imported late: some presses use traits_of
    from sparsekv_pl.presses.span_dropout import SpanDropoutPress

    scorer = partial(PressTraits, by_scores=True, trainable=True, works_in_chunks=True, evicts_while_decoding=True)
    wrapper = partial(PressTraits, works_in_chunks=True)
    whole_context = partial(scorer, works_in_chunks=False, evicts_while_decoding=False)
    masking = partial(PressTraits, head_wise=True)
    drops = partial(scorer, trainable=False, in_order=True, only_trains=True)
    queries: tuple[Need, ...] = ("whole queries",)
    chunk_kv = wrapper(first_row_decides=True)
    no_ratio = wrapper(takes_a_ratio=False)
    generating = partial(wrapper, takes_a_ratio=False, while_generating=True)
    expected = partial(scorer, needs=("rotary", *queries), attends="expected", shared_work="mean rotation")
    window = partial(scorer, needs=queries, attends="window", same_at_every_ratio=True)
    kvzip = masking(needs=(*queries, "weights"), attends="by itself", every_layer=True, first_row_decides=True)
    return {
        BasePress: PressTraits(needs=("hidden states",)),
        ScorerPress: scorer(needs=("hidden states",)),
        kvpress.AdaKVPress: masking(),
        kvpress.BlockPress: lambda press: PressTraits(part_tokens=press.block_size),
        kvpress.CAMPress: generating(needs=queries, attends="by itself"),
        kvpress.CapPress: scorer(needs=("rotary", *queries)),
        kvpress.ChunkKVPress: chunk_kv,
        kvpress.ChunkPress: lambda press: PressTraits(part_tokens=press.chunk_length),
        kvpress.CompactorPress: whole_context(needs=(*queries, "keys"), attends="by itself"),
        kvpress.ComposedPress: no_ratio,
        kvpress.CompressionRatioDecodingPress: generating(),
        kvpress.CriticalAdaKVPress: masking(needs=("weights",), first_row_decides=True),  # adds up the rows' budgets
        kvpress.CriticalKVPress: scorer(needs=("weights",)),
        kvpress.CURPress: scorer(),
        kvpress.DecodingPress: generating(),
        kvpress.DMSPress: masking(takes_a_ratio=False, every_layer=True),
        kvpress.DuoAttentionPress: masking(takes_a_ratio=False, attends="by itself", every_layer=True),
        kvpress.EntropyGatedChunkKVPress: chunk_kv,
        kvpress.ExpectedAttentionPress: expected(same_at_every_ratio=True),
        kvpress.ExpectedAttentionStatsPress: expected(),
        kvpress.FastKVzipPress: masking(needs=("hidden states",), every_layer=True),
        kvpress.FinchPress: lambda press: PressTraits(
            needs=queries, attends="window", re_rotates=press.rerotate_keys, needs_question=True
        ),
        kvpress.KeyDiffPress: scorer(same_at_every_ratio=True),
        kvpress.KeyRerotationPress: wrapper(by_scores=True, in_order=True, re_rotates=True),
        kvpress.KnormPress: scorer(same_at_every_ratio=True),
        kvpress.KVComposePress: lambda press: PressTraits(
            needs=("attention",), head_wise=not press.structured, every_layer=True
        ),
        kvpress.KVgradPress: kvzip,
        kvpress.KVzapPress: scorer(needs=("hidden states",)),
        kvpress.KVzipPress: kvzip,
        kvpress.LagKVPress: lambda press: scorer(  # without cross_scoring its scores are ranks
            trainable=press.cross_scoring, order_only=True, same_at_every_ratio=True
        ),
        kvpress.LeverageScorePress: whole_context(needs=("keys",), shared_work="factorisation"),
        kvpress.LUKVPress: masking(every_layer=True),
        kvpress.MergingPress: wrapper(by_scores=True),
        kvpress.NonCausalAttnPress: whole_context(needs=queries, attends="by itself"),
        kvpress.ObservedAttentionPress: scorer(needs=("attention",), evicts_while_decoding=False),
        kvpress.PerLayerCompressionPress: no_ratio,
        kvpress.PrefillDecodingPress: generating(),
        # It would distribute its budget over layers again at every chunk.
        kvpress.PyramidKVPress: window(works_in_chunks=False, every_layer=True),
        kvpress.QFilterPress: scorer(),
        kvpress.RandomPress: scorer(trainable=False),
        kvpress.RestoreKVPress: kvzip,
        kvpress.SimLayerKVPress: wrapper(takes_a_ratio=False, needs=queries, attends="by itself"),
        kvpress.SnapKVPress: window(),
        kvpress.StreamingLLMPress: scorer(trainable=False),
        kvpress.ThinKPress: wrapper(takes_a_ratio=False, needs=queries),
        kvpress.TOVAPress: window(),
        InOrderPress: scorer(needs=("hidden states",), in_order=True),
        SpanDropoutPress: drops(),
        presses.AdaptiveBlockDropoutPress: drops(needs=("queries",)),
        presses.AnchorPress: scorer(trainable=False, in_order=True),  # its scorer trains
        presses.BlockDropoutPress: drops(),
        presses.EvictionAugPress: wrapper(decides="drawn"),
        presses.OraclePress: whole_context(trainable=False, needs=("continuation",)),
        # Its scorer trains; while decoding, keys have no positions.
        presses.PagePress: scorer(trainable=False, in_order=True, evicts_while_decoding=False),
        presses.SentenceDropoutPress: drops(),
        # Later chunks do not weigh the keys of earlier ones.
        presses.SoftThresholdPress: scorer(needs=("queries",), in_order=True, works_in_chunks=False),
        presses.SparseRegPress: lambda press: wrapper(
            needs=("queries",), decides="inside", adds_losses=True, only_trains=press.press is None
        ),
        presses.VariableBlockPress: drops(),
    }
