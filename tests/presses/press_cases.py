"""Every press of the matrix: its settings, the positions that it protects, and the promises that it breaks, and why."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    LagKVPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor

from sparsekv_pl.models.anchors import Anchors, table_for
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.adaptive_block_dropout import AdaptiveBlockDropoutPress
from sparsekv_pl.presses.anchor import AnchorPress
from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.sentence_dropout import SentenceDropoutPress
from sparsekv_pl.presses.soft_threshold import SoftThresholdPress
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.variable_block import VariableBlockPress
from sparsekv_pl.presses.whole_pages import PagePress

Options = Mapping[str, Any]
Protects = Callable[[Any, Tensor], list[int]]
"""Takes a press and one row's ids (L,); returns the positions that it never evicts, the most protected first."""


@dataclass(frozen=True)
class Setting:
    """Contexts, and how much of them goes."""

    name: str
    compression_ratio: float
    rows: int
    tokens: int | None
    """None: the fewest that the press takes."""
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


EASY = Setting("easy", 0.5, 1, 96)
SETTINGS = (
    EASY,
    Setting("defaults", 0.4, 2, 160),  # the press as it comes
    Setting("tight", 0.93, 3, 96),  # what is protected does not fit the budget
    Setting("odd", 0.37, 2, 97),  # blocks that do not divide the length, windows of one token
    Setting("short", 0.5, 2, None),
    Setting("bfloat16", 0.7, 2, 96, torch.bfloat16),
)


@dataclass(frozen=True)
class PressCase:
    """One press."""

    build: Callable[..., BasePress]
    """Called with the compression ratio and a setting's options."""
    options: Mapping[str, Options] = field(default_factory=dict)
    """By setting, on top of those of ``easy``; none in ``defaults``."""
    protects: Protects = lambda press, ids: []  # noqa: ARG005
    in_order: bool = False
    """Whether as many of the protected stay as fit the budget, in their order. If not, too many promise nothing."""
    shortest: int = 2
    evicts_in: tuple[bool, ...] = (False, True)
    """In which of evaluation (False) and training."""
    drawn_by: tuple[str, ...] = ()
    """What a random selection depends on: ``seed``, ``step``."""
    padding_blurs: str = ""
    """Why padding, which goes first, may still change which other keys stay."""
    breaks: Mapping[str, str] = field(default_factory=dict)
    """Model, wrapper or promise -> why the press fails there. A test fails if it does not."""

    def __str__(self) -> str:
        return press_name(self.press())

    def press(self, setting: str = "easy", compression_ratio: float = 0.5, **more: Any) -> Any:
        """A new one."""
        options: Options = {} if setting == "defaults" else self.options.get("easy", {}) | self.options.get(setting, {})
        return self.build(compression_ratio, **(options | more))

    def holds(self, *promises: str) -> AbstractContextManager[Any]:
        """Around a check: expects that it fails where the press is known to break one of ``promises``."""
        broken = any(promise in self.breaks for promise in promises)
        return pytest.raises((AssertionError, AttributeError, ValueError)) if broken else nullcontext()


def ends(start: str | int, recent: str | int) -> Protects:
    """The first and then the most recent tokens, as many as given or as the press's settings of these names say."""

    def positions(press: Any, ids: Tensor) -> list[int]:
        first, last = (name if isinstance(name, int) else int(getattr(press, name)) for name in (start, recent))
        return [*range(len(ids))[:first], *range(len(ids))[::-1][:last]]

    return positions


def lag_ends(press: LagKVPress, ids: Tensor) -> list[int]:
    """The tail is the last whole lag and what is left over; a context of less than two lags has none."""
    after, lag = len(ids) - press.n_sink, press.lag_size
    tail = lag + after % lag if after >= 2 * lag else 0
    return ends(press.n_sink, tail)(press, ids)


def anchors(press: AnchorPress, ids: Tensor) -> list[int]:
    """Sinks, recent tokens, special ones, punctuation."""
    chosen, off = press.anchors, Anchors(0, 0, special=False, punctuation=False)
    table = table_for(press.tokenizer, ids.device)
    found = {
        kind: Anchors(**(vars(off) | {kind: True})).mask(ids[None], table)[0].nonzero()[:, 0].flip(0).tolist()
        for kind in ("special", "punctuation")
        if getattr(chosen, kind)
    }
    return [*ends(chosen.sinks, chosen.recent)(press, ids), *(place for kind in found.values() for place in kind)]


WINDOWS = {"easy": {"window_size": 8}, "odd": {"window_size": 1}, "short": {"window_size": 1}}

KVPRESS = (
    PressCase(KnormPress),
    PressCase(KeyDiffPress, shortest=3),  # of two keys, each differs from their mean by as much
    PressCase(SnapKVPress, options=WINDOWS, protects=ends(0, "window_size")),
    PressCase(TOVAPress, protects=ends(0, 1)),
    PressCase(ExpectedAttentionPress, protects=ends("n_sink", 0), shortest=6),
    PressCase(
        LagKVPress,
        options={"easy": {"lag_size": 16}, "odd": {"lag_size": 7}, "short": {"lag_size": 1}},
        protects=lag_ends,
        shortest=7,
    ),
    PressCase(StreamingLLMPress, protects=ends("n_sink", 0), shortest=5),
    PressCase(lambda ratio, **options: RandomPress(ratio, **({"seed": 0} | options)), drawn_by=("seed",)),
    PressCase(
        lambda ratio, **options: CriticalKVPress(SnapKVPress(ratio, **options)),
        options=WINDOWS,
        breaks={"phi3": "reads config.head_dim, which Phi3's config does not have"},
    ),
    PressCase(lambda ratio: KeyRerotationPress(KnormPress(ratio))),
    PressCase(
        lambda ratio: AdaKVPress(KnormPress(ratio)), breaks={"chunks": "refused: it hides pairs, and frees none"}
    ),
)

PROTECTED = {"protect_start": 4, "protect_recent": 16}
SPANS: dict[str, Any] = {
    "protects": ends("protect_start", "protect_recent"),
    "in_order": True,
    "shortest": 1,
    "evicts_in": (True,),
    "drawn_by": ("seed", "step"),
}
KVPRESS_PADDING = {"padding": "kvpress's own presses take padding for text"}
BLOCKS = {"easy": {"block_size": 8, **PROTECTED}, "odd": {"block_size": 7}, "short": {"block_size": 1}}

OURS = (
    PressCase(
        lambda ratio, **options: EvictionAugPress(
            [KnormPress(ratio), SnapKVPress(ratio, window_size=1), StreamingLLMPress(ratio, n_sink=1)], **options
        ),
        drawn_by=("seed", "step"),
        breaks=KVPRESS_PADDING,
    ),
    PressCase(BlockDropoutPress, BLOCKS, **SPANS),
    PressCase(
        AdaptiveBlockDropoutPress,
        {
            "easy": {**BLOCKS["easy"], "window_size": 8},
            "odd": {"block_size": 7, "window_size": 1},
            "short": {"block_size": 1, "window_size": 1},
            "tight": {"temperature": 0.0},
            "bfloat16": {"temperature": float("inf")},
        },
        **(SPANS | {"shortest": 2}),
    ),
    PressCase(
        VariableBlockPress,
        {
            "easy": {"shortest": 2, "longest": 9, **PROTECTED},
            "odd": {"shortest": 7, "longest": 7},
            "short": {"shortest": 1},
            "bfloat16": {"shared": True},
        },
        **SPANS,
    ),
    PressCase(
        SentenceDropoutPress,
        {"easy": PROTECTED, "odd": {"max_tokens": 5}, "short": {"max_tokens": 1}, "bfloat16": {"shared": True}},
        **SPANS,
        breaks={"Chunk": "it must know every key's token"},
    ),
    PressCase(
        SoftThresholdPress,
        WINDOWS,
        protects=ends("sinks", "window_size"),
        in_order=True,
        evicts_in=(False,),  # in training keys fade out
        breaks={"chunks": "refused: later chunks would have to weigh the keys of earlier ones"},
    ),
    PressCase(
        lambda ratio, **options: SparseRegPress(SnapKVPress(ratio, **options), **options),
        WINDOWS,
        protects=lambda press, ids: ends(0, "window_size")(press.press, ids),
        breaks=KVPRESS_PADDING,
    ),
    PressCase(
        PagePress,
        {
            "easy": {"page_tokens": 8},
            "odd": {"page_tokens": 7, "shared": False},
            "short": {"page_tokens": 1},
            "bfloat16": {"shared": False, "sinks": 0},
        },
        protects=ends("sinks", 0),
        in_order=True,
        breaks=KVPRESS_PADDING,
    ),
    PressCase(
        AnchorPress,
        {
            "easy": {"anchors": Anchors(sinks=4, recent=8)},
            "tight": {"anchors": Anchors(sinks=3, recent=2)},
            "odd": {"anchors": Anchors(sinks=0, recent=0)},
        },
        protects=anchors,
        in_order=True,
        shortest=3,
    ),
    PressCase(
        lambda ratio, **options: AnchorPress(ratio, SnapKVPress(**options), Anchors(recent=4, punctuation=False)),
        WINDOWS,
        protects=anchors,
        in_order=True,
        padding_blurs="SnapKVPress looks from the last tokens of the batch, padding too",
    ),
)

CASES = (*KVPRESS, *OURS)
