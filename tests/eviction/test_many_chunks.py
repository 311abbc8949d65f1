"""Real eviction in many chunks: each chunk sees the cache as the earlier ones left it, at true positions."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    MergingPress,
    NonCausalAttnPress,
    PerLayerCompressionPress,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    TOVAPress,
)
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.nesting import press_name
from tests.random_models import Build

CONTEXT, CHUNK, CONTINUATION = 48, 12, 8
RATIO = 0.5

presses = pytest.mark.parametrize(
    "press",
    [KnormPress(), ExpectedAttentionPress(), SnapKVPress(window_size=4), TOVAPress(), KeyDiffPress()],
    ids=press_name,
)


def ids() -> tuple[Tensor, Tensor]:
    """Make rows of distinct tokens, so that a layer-0 value identifies its token."""
    generator = torch.Generator().manual_seed(0)
    everything = torch.stack([torch.randperm(64, generator=generator) for _ in range(2)])
    return everything[:, :CONTEXT], everything[:, CONTEXT : CONTEXT + CONTINUATION]


def run(model: PreTrainedModel, press: BasePress, tokens: int = CONTEXT, **settings: Any) -> Prefilled:
    press.compression_ratio = RATIO
    with torch.no_grad():
        return prefill(model, ids()[0][:, :tokens], press, CHUNK, **settings)


@torch.no_grad()
def kept_positions(model: PreTrainedModel, prefilled: Prefilled) -> Tensor:
    """Find the context positions (B, K, S) of layer 0's pairs, in the order of the cache, from their values."""
    values, full = prefilled.cache.layers[0].values, prefill(model, ids()[0], None).cache.layers[0].values
    return torch.cdist(values, full).argmin(-1)


@dataclass
class Oldest(ScorerPress):
    """Keeps the oldest pairs, so that a chunk's newest tokens go at once."""

    compression_ratio: float = 0.0

    def score(self, module: Any, hidden_states: Any, keys: Tensor, *_: Any) -> Tensor:  # noqa: ARG002
        return -torch.arange(keys.shape[2], dtype=keys.dtype).expand(keys.shape[:3])


@dataclass
class Fails(Oldest):
    """Fails in the second chunk."""

    def score(self, module: Any, hidden_states: Any, keys: Tensor, *rest: Any) -> Tensor:
        if keys.shape[2] > CHUNK:
            raise RuntimeError("second chunk")
        return super().score(module, hidden_states, keys, *rest)


@presses
@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.5, 0.9])
def test_after_every_chunk_the_cache_holds_what_the_ratio_leaves(
    random_model: Build, press: BasePress, ratio: float
) -> None:
    model = random_model()
    for seen in range(CHUNK, CONTEXT + 1, CHUNK):
        press.compression_ratio = ratio
        cache = prefill(model, ids()[0][:, :seen], press, CHUNK).cache
        assert [layer.keys.shape[2] for layer in cache.layers] == [int(seen * (1 - ratio))] * 2


@pytest.mark.parametrize("budget, lengths", [(5, [5, 5, 5, 5]), (10, [6, 10, 10, 10]), (100, [6, 12, 18, 24])])
def test_a_budget_is_never_exceeded(random_model: Build, budget: int, lengths: list[int]) -> None:
    model = random_model()
    for seen, expected in zip(range(CHUNK, CONTEXT + 1, CHUNK), lengths, strict=True):
        assert run(model, KnormPress(), seen, budget=budget).cache.get_seq_length() == expected


def test_a_budget_decides_in_one_chunk_too(random_model: Build) -> None:
    evicted = RealEviction(KnormPress(), budget=6)(random_model(), *ids(), compression_ratio=RATIO, step=0)
    assert evicted.kept_share == 6 / CONTEXT


@presses
def test_positions_say_where_the_scored_pairs_came_from(random_model: Build, press: BasePress) -> None:
    """The last chunk's kept positions by its scores must be those that the cache's values show."""
    model = random_model()
    prefilled = run(model, press, request=Request(scores=True))
    last = next(selection for selection in reversed(prefilled.selections) if selection.layer == 0)
    chosen = last.scores.topk(CONTEXT // 2, dim=-1).indices
    assert torch.equal(last.positions.gather(-1, chosen).sort(-1).values, kept_positions(model, prefilled))


@pytest.mark.parametrize("press", [Oldest(), KeyRerotationPress(Oldest()), MergingPress(Oldest())], ids=press_name)
def test_positions_are_true_where_a_chunk_lost_its_newest_tokens(random_model: Build, press: BasePress) -> None:
    selections = run(random_model(), press, request=Request(scores=True)).selections
    scored = [selection.positions[0, 0].tolist() for selection in selections if selection.layer == 1]
    first = list(range(CHUNK))
    # 6, 12 and 18 pairs stay: all of the first chunk's oldest, then what is oldest among the rest.
    second = first[:6] + list(range(12, 24))
    third = second[:12] + list(range(24, 36))
    assert scored == [first, second, third, third[:18] + list(range(36, 48))]


def test_positions_are_true_after_a_chunk_that_evicted_nothing(random_model: Build) -> None:
    """Of 6, 12, 18, 24 and 30 tokens seen 5, 11, 17, 23 and 28 stay: only the first and the fifth chunk evict."""
    selections = prefill(random_model(), ids()[0], Oldest(0.04), 6, request=Request(scores=True)).selections
    scored = [selection.positions[0, 0].tolist() for selection in selections if selection.layer == 1]
    assert scored == [list(range(6)), [*range(5), *range(6, 30)]]


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@presses
@pytest.mark.parametrize("layers", [1, 2])
def test_equals_one_pass_whose_mask_hides_from_each_chunk_what_was_dropped_before(
    random_model: Build, press: BasePress, layers: int
) -> None:
    model = random_model(num_hidden_layers=layers).double()
    context, continuation = ids()
    eviction = RealEviction(press, CHUNK)
    evicted = eviction(model, context, continuation, compression_ratio=RATIO, step=0, request=Request(scores=True))
    tokens = CONTEXT + CONTINUATION
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(layers, 2, 2, 1, 1)
    for selection in evicted.selections:
        seen = int(selection.positions.max()) + 1
        kept = selection.positions.gather(-1, selection.scores.topk(seen // 2, dim=-1).indices)
        is_kept = torch.zeros(2, 2, tokens, dtype=torch.bool).scatter(2, kept, True)
        is_kept[..., seen:] = True
        visible[selection.layer, :, :, seen:] &= is_kept[:, :, None]

    def hide(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": visible[module.layer_idx].repeat_interleave(2, dim=1)}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    with attention_implementation(model, "sdpa"):
        expected = model.model(input_ids=torch.cat([context, continuation], 1)).last_hidden_state[:, CONTEXT:]
    torch.testing.assert_close(evicted.hidden, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    parameters = list(model.model.parameters())
    got, wanted = (torch.autograd.grad((x * weights).sum(), parameters) for x in (evicted.hidden, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_expected_attention_looks_ahead_from_the_true_position(random_model: Build) -> None:
    model, future = random_model(), 16
    rotary, asked = model.model.rotary_emb, []
    hook = rotary.register_forward_hook(
        lambda _, args, kwargs, __: asked.append((*args, *kwargs.values())[1][0].tolist()), with_kwargs=True
    )
    run(model, ExpectedAttentionPress(n_future_positions=future))
    hook.remove()
    expected = [list(range(stop, stop + future)) for stop in range(CHUNK, CONTEXT + 1, CHUNK)]  # layers share them
    assert [positions for positions in asked if len(positions) == future] == expected  # the model itself asks for CHUNK
    assert all(layer.self_attn.rotary_emb is rotary for layer in model.model.layers)


@torch.no_grad()
def test_rerotated_keys_stand_at_the_first_positions(random_model: Build) -> None:
    """Layer 0: each head's keys equal those of a context that consists of the head's kept tokens alone."""
    model, (context, _) = random_model(), ids()
    prefilled = run(model, KeyRerotationPress(KnormPress()))
    assert prefilled.next_position == prefilled.cache.get_seq_length() == CONTEXT // 2
    kept = kept_positions(model, prefilled)
    for head in range(2):
        alone = prefill(model, context.gather(1, kept[:, head]), None).cache.layers[0].keys[:, head]
        torch.testing.assert_close(prefilled.cache.layers[0].keys[:, head], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other", [KeyRerotationPress(KnormPress()), SnapKVPress(window_size=8)], ids=["rerotates", "same name"]
)
def test_a_press_that_was_not_drawn_changes_nothing(random_model: Build, other: BasePress) -> None:
    model, drawn = random_model(), SnapKVPress(window_size=2)
    alone = run(model, drawn)
    mixed = run(model, EvictionAugPress([drawn, other], score_all=True), request=Request(scores=True))
    assert mixed.next_position == alone.next_position == CONTEXT
    for layer, expected in zip(mixed.cache.layers, alone.cache.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)


@pytest.mark.parametrize(
    "press", [KnormPress(0.4), EvictionAugPress([KnormPress(0.4), TOVAPress(0.2)])], ids=press_name
)
def test_the_ratio_is_restored(random_model: Build, press: BasePress) -> None:
    prefill(random_model(), ids()[0], press, CHUNK, budget=7)
    assert press.compression_ratio == 0.4
    if isinstance(press, EvictionAugPress):
        assert press.presses[1].compression_ratio == 0.2


def test_after_an_exception_ratio_rotary_and_hooks_are_as_before(random_model: Build) -> None:
    model, press = random_model(), Fails(0.4)
    implementation = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="second chunk"):
        prefill(model, ids()[0], press, CHUNK)
    assert press.compression_ratio == 0.4
    assert "score" not in vars(press)
    assert model.config._attn_implementation == implementation
    assert all(layer.self_attn.rotary_emb is model.model.rotary_emb for layer in model.model.layers)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "press, with_scores, message",
    [
        (SnapKVPress(0.5, window_size=12), False, "chunks of 12"),
        (ExpectedAttentionPress(0.5, n_sink=12), False, "chunks of 12"),
        (AdaKVPress(KnormPress(0.5)), False, "cannot evict from 4 chunks"),
        (EvictionAugPress([KnormPress(0.5), BlockPress(KnormPress(0.5))]), False, "cannot evict from 4 chunks"),
        (
            ChunkKVPress(KnormPress(0.5)),
            True,
            "from 4 chunks and does not keep the highest scores, so a selec",
        ),
        (PyramidKVPress(0.5, window_size=2), False, "cannot evict from 4 chunks"),
        (NonCausalAttnPress(0.5), False, "cannot evict from 4 chunks"),
        (PerLayerCompressionPress(KnormPress(), [0.3, 0.6]), False, "no compression_ratio to set"),
        (ComposedPress([KnormPress(0.5), TOVAPress(0.5)]), False, "no compression_ratio to set"),
    ],
)
def test_presses_that_cannot_be_run_in_chunks_say_so(
    random_model: Build, press: BasePress, with_scores: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prefill(random_model(), ids()[0], press, CHUNK, request=Request(scores=with_scores))
    with pytest.raises(ValueError, match=message):
        RealEviction(press, CHUNK).check(CONTEXT, Request(scores=with_scores))


class SaysNothing(BlockPress):
    """A press from outside that scores by parts and does not say so."""

    traits = {"part_tokens": 0}  # noqa: RUF012


@pytest.mark.parametrize("press", [BlockPress(KnormPress(), 8), ChunkPress(KnormPress(), 24)], ids=press_name)
def test_scores_by_parts_cannot_be_trained(random_model: Build, press: BasePress) -> None:
    for alone_or_drawn in (press, EvictionAugPress([KnormPress(), press])):
        with pytest.raises(ValueError, match=rf"scores a context of {CONTEXT} tokens by parts of (8|24), which a sel"):
            RealEviction(alone_or_drawn).check(CONTEXT, Request(scores=True))
    RealEviction(press).check(CONTEXT)
    RealEviction(ChunkPress(KnormPress(), CONTEXT)).check(CONTEXT, Request(scores=True))
    with pytest.raises(ValueError, match="scores the context by parts"):
        prefill(random_model(), ids()[0], SaysNothing(KnormPress(0.5), 8), request=Request(scores=True))
