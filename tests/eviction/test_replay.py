"""One recorded prefill serves every press: each must leave the same cache as its own prefill."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    ComposedPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    LagKVPress,
    MergingPress,
    PerLayerCompressionPress,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import continue_from, full_cache, prefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses import AnchorPress, EvictionAugPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import set_compression_ratio
from tests.random_models import Build

CONTEXT, CONTINUATION = 40, 8
ENDS = Anchors(sinks=2, recent=4, special=False, punctuation=False)
ONCE_FOR_ALL_RATIOS = (
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    PyramidKVPress,
    SnapKVPress,
    TOVAPress,
)


def ids() -> tuple[Tensor, Tensor]:
    everything = torch.randint(0, 64, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    return everything[:, :CONTEXT], everything[:, CONTEXT:]


def snap(ratio: float = 0.0) -> SnapKVPress:
    return SnapKVPress(ratio, window_size=4)


@torch.no_grad()
def continued(model: PreTrainedModel, prefilled: Prefilled) -> Tensor:
    return continue_from(model, ids()[1], prefilled.cache, prefilled.next_position)


@torch.no_grad()
def check(recorded: RecordedPrefill, press: BasePress) -> None:
    """Check that a replay equals a prefill: the pairs, the next position and a continuation's hidden states."""
    model = recorded.model
    replayed = recorded.evicted(press)
    pairs = [(layer.keys.clone(), layer.values.clone()) for layer in replayed.cache.layers]
    hidden = continued(model, replayed)
    fresh = prefill(model, ids()[0], press)
    assert replayed.next_position == fresh.next_position
    for pair, layer in zip(pairs, fresh.cache.layers, strict=True):
        assert torch.equal(pair[0], layer.keys)
        assert torch.equal(pair[1], layer.values)
    assert torch.equal(hidden, continued(model, fresh))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8])
@pytest.mark.parametrize(
    "press",
    [
        KnormPress(),
        ExpectedAttentionPress(),
        snap(),
        TOVAPress(),
        KeyDiffPress(),
        StreamingLLMPress(),
        LagKVPress(lag_size=8),
        CURPress(),
        PyramidKVPress(window_size=4, beta=4),
        AdaKVPress(snap()),
        AdaKVPress(ExpectedAttentionPress()),
        KeyRerotationPress(KnormPress()),
        CriticalKVPress(snap()),
        BlockPress(KnormPress(), block_size=8),
        MergingPress(KnormPress()),
        EvictionAugPress([TOVAPress(), KnormPress()]),
        AnchorPress(press=snap(), anchors=ENDS),
        AdaKVPress(AnchorPress(anchors=ENDS)),
        KeyRerotationPress(AnchorPress(anchors=ENDS)),
    ],
    ids=press_name,
)
def test_a_replay_equals_a_prefill_under_the_press(random_model: Build, press: BasePress, ratio: float) -> None:
    set_compression_ratio(press, ratio)
    check(RecordedPrefill(random_model(), ids()[0]), press)


@pytest.mark.parametrize(
    "press",
    [
        PerLayerCompressionPress(KnormPress(), [0.2, 0.7]),
        ThinKPress(key_channel_compression_ratio=0.5, window_size=4),
        ComposedPress([KnormPress(0.3), ThinKPress(key_channel_compression_ratio=0.5, window_size=4)]),
        ComposedPress([KnormPress(0.3)] * 2),
    ],
    ids=press_name,
)
def test_presses_with_rules_of_their_own_are_replayed_too(random_model: Build, press: BasePress) -> None:
    check(RecordedPrefill(random_model(), ids()[0]), press)


def test_presses_one_after_the_other_leave_nothing_to_the_next(random_model: Build) -> None:
    """AdaKVPress masks pairs in the layers; ThinKPress and MergingPress write into the keys and values they get."""
    model = random_model()
    recorded = RecordedPrefill(model, ids()[0])
    ada, think = AdaKVPress(snap(0.5)), ThinKPress(key_channel_compression_ratio=0.5, window_size=4)
    for press in (snap(0.5), ada, think, snap(0.5), MergingPress(KnormPress(0.5)), ada, KnormPress(0.3), ada):
        check(recorded, press)
    continued(model, recorded.evicted(ada))
    expected = full_cache(model, *ids())
    hidden = continued(model, recorded.evicted(None))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)


def test_the_masks_of_a_headwise_press_are_gone_for_the_next(random_model: Build) -> None:
    """Straight after one another: no prefill in between that would clear them."""
    model = random_model()
    recorded = RecordedPrefill(model, ids()[0])
    expected = [continued(model, recorded.evicted(press)) for press in (None, snap(0.5))]
    for press, hidden in zip((None, snap(0.5)), expected, strict=True):
        masked = continued(model, recorded.evicted(AdaKVPress(KnormPress(0.8))))
        assert not torch.equal(masked, hidden)
        assert torch.equal(continued(model, recorded.evicted(press)), hidden)


@dataclass
class RunsTheModel(BasePress):
    """A press like KVzipPress, which overrides ``__call__`` and evicts when the block ends."""

    compression_ratio: float = 0.5
    contexts: list[Tensor] = field(default_factory=list)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        caches: list[DynamicCache] = []

        def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:  # noqa: ARG001
            self.contexts.append(kwargs["input_ids"])
            caches.append(kwargs["past_key_values"])

        hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        for layer in caches[0].layers:
            kept = int(layer.keys.shape[2] * (1 - self.compression_ratio))
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_press_that_runs_the_model_gets_a_prefill_of_its_own(random_model: Build, wrapped: bool) -> None:
    model, press = random_model(), RunsTheModel()
    recorded = RecordedPrefill(model, ids()[0])
    assert press.contexts == []
    prefilled = recorded.evicted(EvictionAugPress([press]) if wrapped else press)
    assert len(press.contexts) == 1
    assert torch.equal(press.contexts[0], ids()[0])
    for layer, full in zip(prefilled.cache.layers, recorded.cache.layers, strict=True):
        assert torch.equal(layer.keys, full.keys[:, :, : CONTEXT // 2])


def test_recording_leaves_no_hooks_and_no_graph(random_model: Build) -> None:
    model = random_model()
    recorded = RecordedPrefill(model, ids()[0])
    recorded.evicted(KnormPress(0.5))
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(layer.keys.requires_grad for layer in recorded.cache.layers)


@pytest.mark.parametrize("kind", ONCE_FOR_ALL_RATIOS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_a_score_is_computed_once_for_all_ratios(random_model: Build, kind: type[ScorerPress]) -> None:
    press = snap() if kind is SnapKVPress else kind(window_size=4) if kind is PyramidKVPress else kind()
    calls = []

    class Counted(kind):  # type: ignore[misc, valid-type]
        def score(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(module.layer_idx)
            return super().score(module, *args, **kwargs)

    recorded = RecordedPrefill(random_model(), ids()[0])
    for ratio in (0.25, 0.5, 0.75):
        set_compression_ratio(press, ratio)
        check(recorded, press)
    assert len(recorded._scores) == 2
    counted = Counted(**vars(press))
    check(recorded, counted)  # a subclass may score by the ratio: it is asked every time
    assert calls == [0, 1, 0, 1]
    assert "score" not in vars(press)
