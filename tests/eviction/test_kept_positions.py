"""The positions found in a cache, against those that the press is known to have kept."""

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    ChunkKVPress,
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
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.kept_positions import kept_positions, masked_keys
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.prefilled_cache import copy_cache
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.traits import traits_of
from tests.random_models import Build

CONTEXT = 40


def ids() -> Tensor:
    """Tokens of 8 kinds: in the first layer every value is there several times."""
    return torch.randint(0, 8, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


def different_ids() -> Tensor:
    """No token twice: in the first layer no norms tie."""
    return torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :CONTEXT]


def snap(ratio: float = 0.0) -> SnapKVPress:
    return SnapKVPress(ratio, window_size=4)


def think() -> ThinKPress:
    return ThinKPress(key_channel_compression_ratio=0.5, window_size=4)


def kept(recorded: RecordedPrefill, press: BasePress | None) -> tuple[list[Tensor], DynamicCache]:
    cache = recorded.evicted(press).cache
    rotates = press is not None and traits_of(press).re_rotates
    rotary = recorded.model.get_decoder().rotary_emb if rotates else None
    return kept_positions(recorded.cache, cache, masked_keys(recorded.model), rotary), cache


def caught_by(press: BasePress, recorded: RecordedPrefill) -> list[Tensor]:
    """Record the scores (B, K, L) of each layer in a separate prefill."""
    with catch_scores(press) as caught, torch.no_grad():
        prefill(recorded.model, recorded.context_ids, press)
    assert [scored.layer for scored in caught] == [0, 1]
    return [scored.scores for scored in caught]


def topk_mask(scores: Tensor, count: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)


@pytest.mark.parametrize("ratio", [0.3, 0.8])
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
        CriticalKVPress(snap()),
        PerLayerCompressionPress(KnormPress(), [0.2, 0.7]),
        KeyRerotationPress(KnormPress()),
        KeyRerotationPress(ExpectedAttentionPress()),
        MergingPress(KnormPress()),
    ],
    ids=press_name,
)
def test_presses_that_keep_what_they_score_highest(random_model: Build, press: BasePress, ratio: float) -> None:
    if not isinstance(press, PerLayerCompressionPress):
        set_compression_ratio(press, ratio)
    recorded = RecordedPrefill(random_model(), ids())
    masks, cache = kept(recorded, press)
    for scored, mask, layer in zip(caught_by(press, recorded), masks, cache.layers, strict=True):
        assert layer.keys.shape[2] < CONTEXT
        assert torch.equal(mask, topk_mask(scored, layer.keys.shape[2]))


@pytest.mark.parametrize("press", [AdaKVPress(snap(0.5)), AdaKVPress(KnormPress(0.7))], ids=press_name)
def test_what_a_headwise_press_masks_is_not_kept(random_model: Build, press: AdaKVPress) -> None:
    """Across a row's heads the highest scores stay, a fifth of each head's share is safe."""
    recorded = RecordedPrefill(random_model(), different_ids())
    masks, cache = kept(recorded, press)
    for scored, mask, layer in zip(caught_by(press, recorded), masks, cache.layers, strict=True):
        assert layer.keys.shape[2] == CONTEXT
        count = int(CONTEXT * (1 - press.compression_ratio))
        safe = topk_mask(scored, int(count * press.alpha_safeguard))
        ranked = scored.masked_fill(safe, torch.finfo(torch.float32).max)
        assert torch.equal(mask, topk_mask(ranked.flatten(1), 2 * count).view_as(mask))
        assert len(mask.sum(-1).unique()) > 1, "heads keep different numbers"


def test_chunks_stay_or_go_as_a_whole(random_model: Build) -> None:
    recorded = RecordedPrefill(random_model(), ids()[:1])
    for mask in kept(recorded, ChunkKVPress(snap(0.5), chunk_length=5))[0]:
        chunks = mask.unflatten(-1, (-1, 5)).sum(-1)
        assert set(chunks.unique().tolist()) == {0, 5}
        assert int(mask.sum()) == 2 * 20


def test_blocks_score_by_parts_and_keep_the_best(random_model: Build) -> None:
    """Knorm's scores do not depend on the block: keeping blockwise is keeping the best."""
    recorded = RecordedPrefill(random_model(), different_ids())
    for ours, same in zip(
        kept(recorded, BlockPress(KnormPress(0.5), block_size=8))[0], kept(recorded, KnormPress(0.5))[0], strict=True
    ):
        assert torch.equal(ours, same)


@pytest.mark.parametrize(
    "press, plain",
    [(think(), None), (ComposedPress([KnormPress(0.3), think()]), KnormPress(0.3)), (KnormPress(0.0), None)],
    ids=lambda press: press_name(press),
)
def test_zeroed_channels_do_not_hide_a_pair(random_model: Build, press: BasePress, plain: BasePress | None) -> None:
    recorded = RecordedPrefill(random_model(), ids())
    for mask, expected in zip(kept(recorded, press)[0], kept(recorded, plain)[0], strict=True):
        assert torch.equal(mask, expected)
        assert plain is not None or bool(mask.all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("press", [KnormPress(0.5), KeyRerotationPress(KnormPress(0.5))], ids=press_name)
def test_any_dtype(random_model: Build, press: BasePress, dtype: torch.dtype) -> None:
    recorded = RecordedPrefill(random_model(head_dim=32).to(dtype), ids())
    masks, _ = kept(recorded, press)
    for scored, mask in zip(caught_by(press, recorded), masks, strict=True):
        assert torch.equal(mask, topk_mask(scored, CONTEXT // 2))


def cache_of(*layers: tuple[Tensor, Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def pairs(*numbers: int) -> tuple[Tensor, Tensor]:
    """One row and head; a number makes a key and a value of its own."""
    keys = torch.tensor(numbers, dtype=torch.float32)[None, None, :, None] + torch.tensor([0.25, 0.5, 0.75, 1.0])
    return keys, -keys


def test_equal_pairs_are_counted_and_no_more() -> None:
    full = cache_of(pairs(7, 3, 7, 5, 7, 3))
    found = kept_positions(full, cache_of(pairs(7, 5, 7)))[0]
    assert found.tolist() == [[[True, False, True, True, False, False]]]
    found = kept_positions(full, cache_of(pairs(3, 7, 7, 7)))[0]
    assert found.tolist() == [[[True, True, True, False, True, False]]]
    with pytest.raises(ValueError, match="holds are unknown"):
        kept_positions(full, cache_of(pairs(5, 5)))


def test_equal_keys_are_distinguished_by_their_values() -> None:
    keys = pairs(1, 1, 1)[0]
    values = pairs(4, 5, 6)[1]
    found = kept_positions(cache_of((keys, values)), cache_of((keys[:, :, :2], values[:, :, [2, 1]])))[0]
    assert found.tolist() == [[[False, True, True]]]


def test_masks_are_about_what_the_cache_holds() -> None:
    """A pair that moved to another place in the cache is masked where it is."""
    masked = (torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
    found = kept_positions(cache_of(pairs(0, 1, 2, 3)), cache_of(pairs(3, 1, 2)), [masked])[0]
    assert found.tolist() == [[[False, False, True, True]]]


def test_signs_of_zero_and_nan_are_bits_like_others() -> None:
    keys = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [torch.nan, 1.0]])[None, None]
    cache = cache_of((keys, keys))
    for position in range(3):
        row = keys[:, :, position : position + 1]
        assert kept_positions(cache, cache_of((row, row)))[0].nonzero().tolist() == [[0, 0, position]]


def test_rotated_keys_need_the_rotary_embedding(random_model: Build) -> None:
    recorded, press = RecordedPrefill(random_model(), ids()), KeyRerotationPress(KnormPress(0.5))
    with pytest.raises(ValueError, match="rotated to new positions: give the model's rotary embedding"):
        kept_positions(recorded.cache, recorded.evicted(press).cache)


def test_unknown_positions_are_an_error(random_model: Build) -> None:
    model = random_model()
    recorded = RecordedPrefill(model, ids())
    chunked = prefill(model, ids(), KnormPress(0.5), chunk_tokens=10).cache
    with pytest.raises(ValueError, match=r"positions that layer 1 holds are unknown.*prefill in chunks"):
        kept_positions(recorded.cache, chunked)
    merged = copy_cache(recorded.cache)
    merged.layers[0].keys = merged.layers[0].keys[:, :, ::2] + merged.layers[0].keys[:, :, 1::2]
    merged.layers[0].values = merged.layers[0].values[:, :, ::2]
    for rotary in (None, model.model.rotary_emb):
        with pytest.raises(ValueError, match=r"layer 0 holds are unknown.*merged"):
            kept_positions(recorded.cache, merged, rotary=rotary)
    longer = cache_of(*[(layer.keys.repeat(1, 1, 2, 1), layer.values.repeat(1, 1, 2, 1)) for layer in merged.layers])
    with pytest.raises(ValueError, match="compare before the cache is continued"):
        kept_positions(merged, longer)
    with pytest.raises(ValueError, match="caches of 1 and 2 layers"):
        kept_positions(cache_of(pairs(1)), recorded.cache)
