"""Anchors stay, the scorer chooses the rest: exactly the budget, in every way that a press is used."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    LagKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import sparsekv_pl.modules.eit  # noqa: F401  lets YAML name a press by its class
from sparsekv_pl.anchors import Anchors, table_for
from sparsekv_pl.eviction.chunked import ChunkedEviction
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.eviction.setting import press_settings
from sparsekv_pl.presses.anchor import AnchorPress
from sparsekv_pl.presses.scores import catch_scores, press_name, scorers_in, set_compression_ratio, trainable_scorers
from sparsekv_pl.selection import Selection, SelectionLoss, log_share, pinned

Build = Callable[..., PreTrainedModel]
CONTEXT, CHUNK = 48, 12
SPECIAL, PUNCTUATION = (0, 1), (2, 3)
FEW = Anchors(sinks=2, recent=4)

inner_presses = pytest.mark.parametrize(
    "inner",
    [
        KeyDiffPress,
        KnormPress,
        lambda: SnapKVPress(window_size=6),
        lambda: CriticalKVPress(SnapKVPress(window_size=6)),
        lambda: LagKVPress(lag_size=8, n_sink=3),
        lambda: StreamingLLMPress(n_sink=3),
    ],
    ids=["KeyDiff", "Knorm", "SnapKV", "CriticalKV", "LagKV", "StreamingLLM"],
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """64 ids: two special tokens, a full stop, a comma, and words."""
    from tokenizers import Tokenizer, models

    tokens = ["<s>", "</s>", ".", ",", *(f"word{number}" for number in range(4, 64))]
    raw = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<s>")


@pytest.fixture
def anchor(tokenizer: PreTrainedTokenizerFast) -> Callable[..., AnchorPress]:
    def make(ratio: float = 0.5, inner: ScorerPress | None = None, anchors: Anchors = FEW) -> AnchorPress:
        press = AnchorPress(ratio, KeyDiffPress() if inner is None else inner, anchors)
        press.tokenizer = tokenizer
        return press

    return make


Anchor = Callable[..., AnchorPress]


def context(tokens: int = CONTEXT, rows: int = 2) -> Tensor:
    """Words, none twice in a row, and in each row special tokens and punctuation at places of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([4 + torch.randperm(60, generator=generator)[:tokens] for _ in range(rows)])
    for row in range(rows):
        ids[row, 9 + row], ids[row, 21], ids[row, 30 - row], ids[row, 38] = 0, 2, 1, 3
    return ids


@torch.no_grad()
def scores_of(model: PreTrainedModel, press: ScorerPress, **inputs: Any) -> list[Tensor]:
    """What ``press`` says of every layer in one forward."""
    with catch_scores(press) as caught, press(model):
        model.model(**({"input_ids": context()} | inputs), past_key_values=DynamicCache())
    return [scored.scores for scored in caught]


def ranked(ids: list[int], positions: list[int], anchors: Anchors, seen: int) -> list[int]:
    """Indices into ``positions`` of the anchors, those that stay rather first: as the class says, in plain loops."""
    token_of = dict(enumerate(ids))
    newest_first = sorted(range(len(positions)), key=lambda index: -positions[index])
    sinks = [index for index in reversed(newest_first) if positions[index] < anchors.sinks]
    recent = [index for index in newest_first if positions[index] >= seen - anchors.recent]
    special = [i for i in newest_first if anchors.special and token_of[positions[i]] in SPECIAL]
    punctuation = [i for i in newest_first if anchors.punctuation and token_of[positions[i]] in PUNCTUATION]
    return list(dict.fromkeys([*sinks, *recent, *special, *punctuation]))


def first_by_loops(scores: Tensor, ids: list[int], anchors: Anchors) -> list[int]:
    """The keys of one row and head that stay first: anchors, then those that the scorer itself pins (S,)."""
    tops = (scores == scores.max()).nonzero()[:, 0].flip(0).tolist()
    by_rule = tops if len(tops) > 1 else []
    return list(dict.fromkeys([*ranked(ids, list(range(len(ids))), anchors, len(ids)), *by_rule]))


def check_against_loops(model: PreTrainedModel, press: AnchorPress, inner: ScorerPress) -> None:
    ids, budget = context(), max(1, int(CONTEXT * (1 - press.compression_ratio)))
    full = prefill(model, ids, None).cache
    prefilled = prefill(model, ids, press, with_positions=True)
    for layer, scores in enumerate(scores_of(model, inner)):
        positions, cached = prefilled.positions[layer], prefilled.cache.layers[layer]
        assert positions.shape == (2, 2, budget)
        for name in ("keys", "values"):
            index = positions[..., None].expand_as(cached.keys)
            assert torch.equal(getattr(cached, name), getattr(full.layers[layer], name).gather(2, index))
        for row in range(2):
            for head in range(2):
                own, kept = scores[row, head], positions[row, head]
                first = first_by_loops(own, ids[row].tolist(), press.anchors)
                assert set(first[:budget]) <= set(kept.tolist())
                rest = sorted((float(own[key]) for key in range(CONTEXT) if key not in first), reverse=True)
                filled = sorted((float(own[key]) for key in kept.tolist() if key not in first), reverse=True)
                assert filled == rest[: max(0, budget - len(first))]  # by value: LagKV's scores are ranks, which tie


@torch.no_grad()
@inner_presses
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9, 0.99])
def test_what_stays_is_what_plain_loops_choose(
    random_model: Build, anchor: Anchor, inner: Callable[[], ScorerPress], ratio: float, training: bool
) -> None:
    """Ten anchors of 48 tokens: at 0.9 and 0.99 they do not all fit."""
    alone = inner()
    alone.compression_ratio = ratio
    check_against_loops(random_model().train(training), anchor(ratio, inner()), alone)


@torch.no_grad()
@pytest.mark.parametrize(
    "anchors",
    [
        Anchors(0, 0, False, False),
        Anchors(3, 0, False, False),
        Anchors(0, 5, False, False),
        Anchors(0, 0, True, False),
        Anchors(0, 0, False, True),
        Anchors(100, 3),
        Anchors(3, 100),
    ],
    ids=str,
)
def test_every_kind_of_anchor_alone_and_more_than_the_context_holds(
    random_model: Build, anchor: Anchor, anchors: Anchors
) -> None:
    check_against_loops(random_model(), anchor(0.6, KnormPress(), anchors), KnormPress(0.6))


def test_where_anchors_do_not_fit_sinks_come_first_then_the_newest_of_each_kind(
    random_model: Build, anchor: Anchor
) -> None:
    """Row 0 has special tokens at 9 and 30, punctuation at 21 and 38."""
    model, priority = random_model(), [0, 1, 47, 46, 45, 44, 30, 9, 38, 21]
    for budget in range(1, 11):
        press = anchor(1 - (budget + 0.5) / CONTEXT)
        with torch.no_grad():
            positions = prefill(model, context(), press, with_positions=True).positions
        for layer in positions.values():
            assert layer[0].tolist() == [sorted(priority[:budget])] * 2


def test_the_scores_are_the_inner_press_s_and_one_value_for_all_anchors(random_model: Build, anchor: Anchor) -> None:
    model, ids = random_model(), context()
    press = anchor(0.5)
    mask = FEW.mask(ids, table_for(press.tokenizer, ids.device))
    for scores, inner in zip(scores_of(model, press), scores_of(model, KeyDiffPress(0.5)), strict=True):
        assert scores.dtype == torch.float32
        assert torch.equal(pinned(scores), mask[:, None].expand_as(scores))
        assert torch.equal(scores[~pinned(scores)], inner[~pinned(scores)])
        assert scores.max() > inner.max()


@pytest.mark.parametrize(("offset", "step"), [(0, 1), (3e4, 2**8), (-4e4, 2**8), (3e9, 2**25)])
def test_anchors_are_above_scores_that_a_coarse_dtype_could_not_tell_apart(
    anchor: Anchor, offset: float, step: int
) -> None:
    class Large(ScorerPress):
        def score(self, module: Any, hidden_states: Any, keys: Tensor, *_: Any) -> Tensor:  # noqa: ARG002
            return (offset + step * torch.arange(keys.shape[2])).expand(keys.shape[:3]).bfloat16()

    keys = torch.zeros(1, 1, 20, 4, dtype=torch.bfloat16)
    scores = anchor(0.5, Large(), Anchors(3, 0, False, False)).score(torch.nn.Module(), keys, keys, keys, None, {})
    assert scores.dtype == torch.float32
    assert len(set(scores[0, 0, 3:].tolist())) == 17
    assert scores[0, 0, :3].unique().numel() == 1
    assert (scores[..., :3] > scores[..., 3:].amax()).all()


class PinsSix(ScorerPress):
    """Pins the last six keys, and in each row on its own scale."""

    def score(self, module: Any, hidden_states: Any, keys: Tensor, *_: Any) -> Tensor:  # noqa: ARG002
        places = torch.arange(keys.shape[2]).clamp(max=keys.shape[2] - 6).float()
        return (places + 100 * torch.arange(len(keys))[:, None, None]).expand(keys.shape[:3])


def test_what_the_scorer_pins_comes_after_the_anchors_in_each_row_by_itself(anchor: Anchor) -> None:
    """Two sinks, then the newest four of six pinned keys: in the row with the lower scores as well."""
    press, keys = anchor(1 - 6.5 / 20, PinsSix(), Anchors(2, 0, False, False)), torch.zeros(2, 2, 20, 4)
    scores = press.score(torch.nn.Module(), keys, keys, keys, None, {})
    for row in range(2):
        kept = scores[row].topk(6, dim=-1).indices.sort(dim=-1).values
        assert kept.tolist() == [[0, 1, 16, 17, 18, 19]] * 2


def test_padding_that_the_scorer_pins_takes_no_place(anchor: Anchor) -> None:
    """Of the six pinned keys the last three are padding in row 1; the real ones stay."""
    press, keys = anchor(1 - 5.5 / 20, PinsSix(), Anchors(2, 0, False, False)), torch.zeros(2, 2, 20, 4)
    mask = torch.ones(2, 20)
    mask[1, -3:] = 0
    scores = press.score(torch.nn.Module(), keys, keys, keys, None, {"attention_mask": mask})
    kept = scores.topk(5, dim=-1).indices.sort(dim=-1).values
    assert kept.tolist() == [[[0, 1, 17, 18, 19]] * 2, [[0, 1, 14, 15, 16]] * 2]


def test_the_scorer_is_shown_the_model_too(random_model: Build, anchor: Anchor) -> None:
    shown: list[PreTrainedModel] = []

    class Prepares(KnormPress):
        def post_init_from_model(self, model: PreTrainedModel) -> None:
            shown.append(model)

    model = random_model()
    pressed(model, anchor(0.5, Prepares()))
    assert shown == [model]


@torch.no_grad()
def test_no_anchors_is_the_inner_press(random_model: Build, anchor: Anchor) -> None:
    model = random_model()
    ours = prefill(model, context(), anchor(0.5, KnormPress(), Anchors(0, 0, False, False))).cache
    for layer, alone in zip(ours.layers, prefill(model, context(), KnormPress(0.5)).cache.layers, strict=True):
        assert torch.equal(layer.keys, alone.keys)
        assert torch.equal(layer.values, alone.values)


@torch.no_grad()
def test_ratio_0_changes_nothing(random_model: Build, anchor: Anchor) -> None:
    model = random_model()
    for layer, full in zip(
        prefill(model, context(), anchor(0.0)).cache.layers, prefill(model, context(), None).cache.layers, strict=True
    ):
        assert torch.equal(layer.keys, full.keys)
        assert torch.equal(layer.values, full.values)


@inner_presses
def test_a_row_keeps_what_it_keeps_alone(random_model: Build, anchor: Anchor, inner: Callable[[], ScorerPress]) -> None:
    model = random_model()
    for ratio in (0.5, 0.85):
        with torch.no_grad():
            together = prefill(model, context(), anchor(ratio, inner()), with_positions=True).positions
            for row in range(2):
                alone = prefill(model, context()[row : row + 1], anchor(ratio, inner()), with_positions=True).positions
                assert all(torch.equal(together[layer][row], alone[layer][0]) for layer in together)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("inner", [KeyDiffPress, lambda: SnapKVPress(window_size=6)], ids=["KeyDiff", "SnapKV"])
def test_anchors_of_earlier_chunks_stay_anchors(
    random_model: Build, anchor: Anchor, inner: Callable[[], ScorerPress], ratio: float
) -> None:
    press, ids = anchor(ratio, inner()), context()
    with torch.no_grad():
        prefilled = prefill(random_model(), ids, press, CHUNK, with_scores=True)
    assert len(prefilled.selections) == 8
    for chunk, (layer, selection) in enumerate((s.layer, s) for s in prefilled.selections):
        assert selection.positions is not None
        seen = CHUNK * (chunk // 2 + 1)
        held = prefilled.selections[chunk + 2].positions if chunk < 6 else prefilled.positions[layer]
        assert held is not None
        for row in range(2):
            for head in range(2):
                positions = selection.positions[row, head].tolist()
                first = [positions[i] for i in ranked(ids[row].tolist(), positions, FEW, seen)]
                kept = [place for place in held[row, head].tolist() if place < seen]
                assert len(kept) == int(seen * (1 - ratio))
                assert set(first[: len(kept)]) <= set(kept)
    if ratio == 0.5:  # no chunk has more anchors than it may keep
        every = {0, 1, 9, 21, 30, 38, 44, 45, 46, 47}
        assert all(every <= set(head) for layer in prefilled.positions.values() for head in layer[0].tolist())


def test_gradients_are_the_inner_press_s_for_all_but_the_anchors(random_model: Build, anchor: Anchor) -> None:
    model, weight = random_model(), torch.randn(2, 2, CONTEXT, generator=torch.Generator().manual_seed(1))

    def gradients(press: ScorerPress, weights: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        with catch_scores(press) as caught, press(model):
            model.model(context(), past_key_values=DynamicCache())
        sum((scored.scores * weights).sum() for scored in caught).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    press = anchor(0.5)
    free = ~FEW.mask(context(), table_for(press.tokenizer, torch.device("cpu")))[:, None]
    ours, theirs = gradients(press, weight), gradients(KeyDiffPress(0.5), weight * free)
    assert ours.keys() == theirs.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in ours.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name])


@pytest.mark.parametrize("inner", [KeyDiffPress, lambda: SnapKVPress(window_size=6)], ids=["KeyDiff", "SnapKV"])
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_the_selection_loss_is_the_inner_press_s_over_what_is_no_anchor(
    random_model: Build, anchor: Anchor, inner: Callable[[], ScorerPress], ratio: float
) -> None:
    """At 0.9 only sinks and two recent tokens fit: of the others, those that SnapKV pins count as worth nothing."""
    model, press, ids = random_model(), anchor(ratio, inner()), context()
    mass = torch.rand(2, 2, CONTEXT, generator=torch.Generator().manual_seed(1))
    stay = torch.zeros(2, 1, CONTEXT, dtype=torch.bool)
    for row in range(2):
        first = ranked(ids[row].tolist(), list(range(CONTEXT)), FEW, CONTEXT)
        stay[row, 0, first[: int(CONTEXT * (1 - ratio))]] = True
    inner_scores = scores_of(model, replace(inner(), compression_ratio=ratio))
    for layer, (scores, alone) in enumerate(zip(scores_of(model, press), inner_scores, strict=True)):
        loss = SelectionLoss(heads="equal")([(Selection(layer, "a", scores.requires_grad_()), mass)])["a"]
        by_rule = pinned(alone)
        free = ~stay & (torch.arange(CONTEXT) >= 4)
        if ratio == 0.5:
            free = free & ~by_rule
        target = torch.where(free, mass, 0)
        target = target / target.sum(-1, keepdim=True)
        expected = -(target * log_share(alone.masked_fill(by_rule, 0), free.expand_as(alone))).sum(-1).mean()
        torch.testing.assert_close(loss, expected)


def test_training_reaches_what_stays_and_what_scores(random_model: Build, anchor: Anchor) -> None:
    model = random_model().train()
    eviction = ChunkedEviction(anchor(), catch_scores=True)
    ids = context()
    evicted = eviction(model, ids[:, :40], ids[:, 40:], compression_ratio=0.5, step=0)
    assert evicted.kept_share == 0.5
    assert [selection.press for selection in evicted.selections] == ["Anchor(KeyDiff)"] * 2
    mass = torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(1))
    loss = SelectionLoss()((selection, mass) for selection in evicted.selections)["Anchor(KeyDiff)"]
    for term in (evicted.hidden.square().mean(), loss):
        model.zero_grad()
        term.backward(retain_graph=True)
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@torch.no_grad()
def test_bfloat16(random_model: Build, anchor: Anchor) -> None:
    model, press = random_model().bfloat16(), anchor(0.7, SnapKVPress(window_size=6))
    prefilled = prefill(model, context(), press, with_positions=True)
    for layer, positions in prefilled.positions.items():
        cached = prefilled.cache.layers[layer]
        assert cached.keys.dtype == torch.bfloat16
        assert cached.keys.shape[2] == positions.shape[-1] == int(CONTEXT * 0.3)
        assert {0, 1, 9, 21, 30, 38, 44, 45, 46, 47} <= set(positions[0, 0].tolist())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_padding_is_no_anchor_and_goes_first(random_model: Build, anchor: Anchor, side: str, ratio: float) -> None:
    model, real = random_model(), 40
    text = context(real)[1]
    padding = torch.full((CONTEXT - real,), 1)  # a special token, as padding often is
    row = torch.cat([padding, text] if side == "left" else [text, padding])
    ids, shift = torch.stack([context()[0], row]), CONTEXT - real if side == "left" else 0
    mask = torch.ones_like(ids)
    mask[1] = torch.cat([0 * padding, torch.ones(real)] if side == "left" else [torch.ones(real), 0 * padding])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    budget = int(CONTEXT * (1 - ratio))
    padded = scores_of(model, anchor(ratio, KnormPress()), input_ids=ids, attention_mask=mask, position_ids=places)
    alone = scores_of(model, anchor(1 - (budget + 0.5) / real, KnormPress()), input_ids=text[None])
    for scores, own in zip(padded, alone, strict=True):
        kept = scores.topk(budget, dim=-1).indices[1].sort(dim=-1).values - shift
        assert torch.equal(kept, own.topk(budget, dim=-1).indices[0].sort(dim=-1).values)
        padded_scores = scores[1, :, ~mask[1].bool()]
        assert padded_scores.max() < scores[1, :, mask[1].bool()].min()
        assert padded_scores.isfinite().all()


def test_a_row_of_hardly_anything_but_padding(random_model: Build, anchor: Anchor) -> None:
    ids, mask = context(), torch.ones(2, CONTEXT, dtype=torch.long)
    mask[1, 3:] = 0
    for inner in (KnormPress(), SnapKVPress(window_size=6)):
        for scores in scores_of(random_model(), anchor(0.5, inner), input_ids=ids, attention_mask=mask):
            kept = scores.topk(24, dim=-1).indices
            assert all({0, 1, 2} <= set(head) for head in kept[1].tolist())
            assert all(set(first) >= {0, 1, 9, 21, 30, 38, 44, 45, 46, 47} for first in kept[0].tolist())


@torch.no_grad()
def pressed(model: PreTrainedModel, press: BasePress, rows: int = 2) -> DynamicCache:
    cache = DynamicCache()
    with press(model):
        model.model(context()[:rows], past_key_values=cache)
    return cache


def test_adakv_masks_no_anchor(random_model: Build, anchor: Anchor) -> None:
    model, press = random_model(), anchor(0.5)
    anchors = FEW.mask(context(), table_for(press.tokenizer, torch.device("cpu")))
    pressed(model, AdaKVPress(press))
    for layer in model.model.layers:
        rows, heads, places = layer.self_attn.masked_key_indices
        assert len(rows) == 2 * 2 * CONTEXT // 2
        assert not anchors[rows, places].any()
        assert len(set(zip(rows.tolist(), heads.tolist(), places.tolist(), strict=True))) == len(rows)


def test_adakv_and_too_many_anchors(random_model: Build, anchor: Anchor) -> None:
    model, press = random_model(), anchor(0.9)
    pressed(model, AdaKVPress(press))
    for layer in model.model.layers:
        rows, heads, places = layer.self_attn.masked_key_indices
        kept = torch.ones(2, 2, CONTEXT, dtype=torch.bool)
        kept[rows, heads, places] = False
        assert kept[0].nonzero()[:, 1].tolist() == [0, 1, 46, 47] * 2


def test_chunk_press_keeps_the_ends_of_every_part(random_model: Build, anchor: Anchor) -> None:
    model = random_model()
    cache = pressed(model, ChunkPress(anchor(0.5), chunk_length=16))
    full = prefill(model, context(), None).cache
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert layer.keys.shape[2] == CONTEXT // 2
        found = torch.cdist(layer.values, whole.values).argmin(-1)
        for part in range(0, CONTEXT, 16):
            ends = {part, part + 1, *range(part + 12, part + 16)}
            assert all(ends <= set(head) for head in found.flatten(0, 1).tolist())


def test_key_rotation_leaves_the_same_keys_turned(random_model: Build, anchor: Anchor) -> None:
    model = random_model()
    with torch.no_grad():
        kept = prefill(model, context(), anchor(0.5), with_positions=True).positions
        full = prefill(model, context(), None).cache
    cache = pressed(model, KeyRerotationPress(anchor(0.5)))
    for index, layer in enumerate(model.model.layers):
        whole, ours = full.layers[index], cache.layers[index]
        turned = KeyRerotationPress.rerotate_keys(layer.self_attn, kept[index], whole.keys)
        torch.testing.assert_close(ours.keys, turned)
        torch.testing.assert_close(ours.values, whole.values.gather(2, kept[index][..., None].expand_as(ours.values)))


def test_composed_before_another_press(random_model: Build, anchor: Anchor) -> None:
    model = random_model()
    think = ThinKPress(key_channel_compression_ratio=0.5, window_size=4)
    cache, alone = pressed(model, ComposedPress([anchor(0.5), think])), pressed(model, anchor(0.5))
    for layer, own in zip(cache.layers, alone.layers, strict=True):
        assert torch.equal(layer.values, own.values)
        assert (layer.keys == 0).any()
    halved = pressed(model, ComposedPress([anchor(0.5), KnormPress(0.5)]))
    assert [layer.keys.shape[2] for layer in halved.layers] == [CONTEXT // 4] * 2


def test_decoding_keeps_the_first_and_the_newest_however_long(random_model: Build, anchor: Anchor) -> None:
    """Four evictions; the tokens of the keys are not known, so their order must be kept."""
    model, cache = random_model(), DynamicCache()
    press = DecodingPress(anchor(0.0), compression_interval=6, target_size=18)
    ids, full = context(), prefill(model, context(), None).cache.layers[0].values
    with torch.no_grad(), press(model):
        model(ids[:, :24], past_key_values=cache)
        for token in range(24, CONTEXT):
            model(ids[:, token : token + 1], past_key_values=cache)
            if token % 6 == 5:
                found = torch.cdist(cache.layers[0].values, full).argmin(-1).flatten(0, 1)
                assert found.shape[1] == 18
                assert (found.diff(dim=-1) > 0).all()
                assert found[:, :2].tolist() == [[0, 1]] * 4
                assert found[:, -4:].tolist() == [list(range(token - 3, token + 1))] * 4
    assert scorers_in(press)[0].compression_ratio == 0.0


@pytest.mark.parametrize("inner", [KeyDiffPress, lambda: SnapKVPress(window_size=6)], ids=["KeyDiff", "SnapKV"])
def test_a_replay_equals_a_prefill(random_model: Build, anchor: Anchor, inner: Callable[[], ScorerPress]) -> None:
    model, press = random_model(), anchor(0.5, inner())
    recorded = RecordedPrefill(model, context())
    for ratio in (0.5, 0.9, 0.25, 0.5):
        press.compression_ratio = ratio
        for wrapped in (press, AdaKVPress(press), KeyRerotationPress(press)):
            with torch.no_grad():
                fresh = prefill(model, context(), wrapped).cache
            masks = [layer.self_attn.masked_key_indices for layer in model.model.layers]
            replayed = recorded.evicted(wrapped).cache
            for index, (layer, own) in enumerate(zip(replayed.layers, fresh.layers, strict=True)):
                assert torch.equal(layer.keys, own.keys)
                assert torch.equal(layer.values, own.values)
                if isinstance(wrapped, AdaKVPress):
                    again = model.model.layers[index].self_attn.masked_key_indices
                    assert all(map(torch.equal, masks[index], again))


def test_kvpress_s_own_pipeline(tiny_models: dict[str, str]) -> None:
    """The tokenizer is the one beside the model's weights."""
    model, own = (kind.from_pretrained(tiny_models["llama"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    asking, cache = pipeline("kv-press-text-generation", model=model, tokenizer=own, device="cpu"), DynamicCache()
    text = "The tiger, old and grey, sleeps. Under the bridge; near the river. " * 6
    press = AnchorPress(0.7, KnormPress(), Anchors(sinks=1, recent=3))
    asking(text, question="Where?", max_new_tokens=2, press=press, cache=cache)
    context_ids = asking.preprocess(text, ["Where?"], answer_prefix="", max_context_length=10_000)["context_ids"]
    anchors = press.anchors.mask(context_ids, own)[0].nonzero()[:, 0]
    budget = int(context_ids.shape[1] * 0.3)
    assert 10 < len(anchors) < budget
    full = prefill(model, context_ids, None).cache
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert layer.keys.shape[2] == budget
        same = (whole.keys[:, :, anchors, None] - layer.keys[:, :, None]).abs().amax(-1) < 1e-5
        assert same.any(-1).all()


def test_without_special_tokens_and_punctuation_no_tokenizer_is_needed(random_model: Build) -> None:
    model, press = random_model(), AnchorPress(0.5, KnormPress(), Anchors(2, 4, special=False, punctuation=False))
    with torch.no_grad():
        check_against_loops(model, press, KnormPress(0.5))
    with pytest.raises(ValueError, match=r"press\.tokenizer = "):
        prefill(model, context(), AnchorPress(0.5))


def test_a_wrapper_that_does_not_show_the_model_is_an_error(random_model: Build, anchor: Anchor) -> None:
    """kvpress's CriticalAdaKVPress."""
    model, press = random_model(), anchor(0.5, KnormPress())
    with pytest.raises(ValueError, match=r"post_init_from_model\(model\)"):
        pressed(model, CriticalAdaKVPress(press))
    press.post_init_from_model(model)
    pressed(model, CriticalAdaKVPress(press), rows=1)  # it takes no more


def test_the_scorer_works_at_the_ratio_of_the_whole(random_model: Build, anchor: Anchor) -> None:
    seen: list[float] = []

    class Notes(KnormPress):
        def score(self, *args: Any) -> Tensor:
            seen.append(self.compression_ratio)
            return super().score(*args)

    press = anchor(0.5, Notes())
    before = press_settings(press)
    set_compression_ratio(press, 0.75)
    pressed(random_model(), press)
    assert seen == [0.75, 0.75]
    set_compression_ratio(press, 0.5)
    assert press_settings(press) == before  # what a run notes of a press does not depend on where it was used


def test_it_is_one_scorer_and_trains() -> None:
    press = AnchorPress()
    assert scorers_in(AdaKVPress(press)) == trainable_scorers(press) == [press]
    assert press_name(press) == "Anchor(KeyDiff)"
    assert isinstance(press.press, KeyDiffPress)
    assert press.anchors == Anchors(sinks=4, recent=64, special=True, punctuation=True)
    assert AnchorPress().anchors is not press.anchors


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"compression_ratio": 1.0}, r"AnchorPress\.compression_ratio is 1\.0"),
        ({"compression_ratio": -0.1}, r"AnchorPress\.compression_ratio is -0\.1"),
        ({"press": AdaKVPress(KnormPress())}, r"AnchorPress\.press is AdaKVPress\(.*around AnchorPress"),
        ({"press": None}, r"AnchorPress\.press is None"),
        ({"press": KnormPress(0.5)}, r"AnchorPress\.press has a compression_ratio of 0\.5.*leave it out"),
        ({"anchors": {"sinks": 1}}, r"AnchorPress\.anchors is \{'sinks': 1\}"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AnchorPress(**settings)


def parsed(init_args: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--press", type=BasePress)
    config = {"press": {"class_path": "sparsekv_pl.presses.anchor.AnchorPress", "init_args": init_args}}
    return parser.instantiate(parser.parse_object(config)).press


def test_yaml_sets_the_anchors_and_the_scorer() -> None:
    press = parsed(
        {
            "compression_ratio": 0.5,
            "anchors": {"sinks": 1, "recent": 8, "punctuation": False},
            "press": {"class_path": "kvpress.SnapKVPress", "init_args": {"window_size": 5}},
        }
    )
    assert press == AnchorPress(0.5, SnapKVPress(window_size=5), Anchors(sinks=1, recent=8, punctuation=False))
    assert type(press.press) is SnapKVPress
    assert parsed({}) == AnchorPress()
    assert parsed({"anchors": {"recent": 8}}).anchors == Anchors(recent=8)


@pytest.mark.parametrize("wrong", [{"anchors": {"sink": 1}}, {"anchors": {"sinks": -1}}, {"tokenizer": "gpt2"}])
def test_yaml_with_a_mistake_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises((ArgumentError, ValueError), match=r"sink|tokenizer"):
        parsed(wrong)
