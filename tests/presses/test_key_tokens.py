"""A press gets the tokens of its keys, in every way that it is used."""

from collections.abc import Callable

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkPress,
    ComposedPress,
    CriticalKVPress,
    DecodingPress,
    KeyRerotationPress,
    KnormPress,
    ScorerPress,
)
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import ChunkedPrefill, prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.key_tokens import TOKEN_IDS, KeyTokens
from sparsekv_pl.presses.press_context import PressContext, press_context_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from tests.presses.tokens_cases import CHUNK, CONTEXT, Blind, Reads, check, context, pressed
from tests.random_models import Build


def pre_hooks(model: PreTrainedModel) -> int:
    return len(model.model._forward_pre_hooks)


def test_at_keys_reads_a_value_per_token() -> None:
    tokens = KeyTokens(torch.tensor([[7, 8, 9]]), torch.tensor([[[2, 0], [1, 1]]]))
    assert tokens.at_keys(torch.tensor([[0.0, 0.5, 1.0]])).tolist() == [[[1.0, 0.0], [0.5, 0.5]]]


def test_one_chunk(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    with torch.no_grad():
        prefill(model, context(), press)
    assert [call.layer for call in press.calls] == [0, 1]
    for call in press.calls:
        check(model, call)
        assert torch.equal(call.tokens.positions, torch.arange(CONTEXT).expand(2, 2, -1))


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.9])
def test_many_chunks(random_model: Build, ratio: float) -> None:
    """At 0.01 the first chunks are too short to lose a pair, and no scorer runs."""
    model, press = random_model(), Reads(ratio)
    with torch.no_grad():
        prefilled = prefill(model, context(), press, CHUNK)
    ends = {(call.layer, call.tokens.ids.shape[1]) for call in press.calls if call.tokens is not None}
    assert len(ends) == len(press.calls) >= 2  # every layer of every chunk that evicted
    for call in press.calls:
        check(model, call, call.tokens.ids.shape[1])
    held = {call.layer: call.tokens.positions for call in press.calls if call.tokens is not None}
    for layer, positions in prefilled.positions.items():
        for kept, shown in zip(positions[0].tolist(), held[layer][0].tolist(), strict=True):
            assert {place for place in kept if place <= max(shown)} <= set(shown)


def test_chunks_that_lose_nothing_between_chunks_that_do(random_model: Build) -> None:
    """int(seen * 0.97) stay: 11 of 12 tokens, 23 of 24 (all that are held then), 34 of 36."""
    model, press = random_model(), Reads(0.03)
    with torch.no_grad():
        prefill(model, context(), press, CHUNK)
    seen = [call.tokens.ids.shape[1] for call in press.calls if call.layer == 0 and call.tokens is not None]
    assert seen == [12, 36]
    for call in press.calls:
        check(model, call, call.tokens.ids.shape[1])


def test_a_saved_prefill_knows_the_tokens_of_its_first_half(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    with torch.no_grad():
        first = ChunkedPrefill(model, press, CONTEXT, CHUNK)
        for start, stop in first.bounds[:2]:
            first.advance(context()[:, start:stop])
        second = ChunkedPrefill(model, press, CONTEXT, CHUNK)
        second.load_state_dict(first.state_dict())
        for start, stop in second.bounds[2:]:
            second.advance(context()[:, start:stop])
    for call in press.calls:
        check(model, call, call.tokens.ids.shape[1])
    assert [call.tokens.ids.shape[1] for call in press.calls[::2]] == [12, 24, 36, 48]


def test_a_replay_knows_the_tokens_too(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    RecordedPrefill(model, context()).evicted(press)
    assert [call.layer for call in press.calls] == [0, 1]
    for call in press.calls:
        check(model, call)


@pytest.mark.parametrize("wrap", [AdaKVPress, KeyRerotationPress, CriticalKVPress])
@pytest.mark.parametrize("ours", [False, True])
def test_inside_a_wrapper(random_model: Build, wrap: Callable[[ScorerPress], BasePress], ours: bool) -> None:
    model, inner = random_model(), Reads()
    press = wrap(inner)
    set_compression_ratio(press, 0.5)
    with torch.no_grad():
        if ours:
            prefill(model, context(), press)
        else:
            pressed(model, press)
    assert len(inner.calls) == 2
    for call in inner.calls:
        check(model, call)


def test_inside_eviction_aug_press(random_model: Build) -> None:
    model, inner = random_model(), Reads(0.5)
    eviction = RealEviction(EvictionAugPress([KnormPress(), inner], weights=[0, 1]))
    eviction(model, context()[:, :40], context()[:, 40:], compression_ratio=0.5, step=0)
    for call in inner.calls:
        check(model, call, 40)


def test_first_and_second_of_composed_presses(random_model: Build) -> None:
    model, first, second = random_model(), Reads(0.5), Reads(0.5)
    pressed(model, ComposedPress([first, second]))
    for call in first.calls:
        check(model, call)
    assert [call.tokens for call in second.calls] == [None, None]  # it is unknown what the first one kept


@pytest.mark.parametrize("ours", [False, True])
def test_parts_of_the_keys_have_no_known_tokens(random_model: Build, ours: bool) -> None:
    model, inner = random_model(), Reads(0.5)
    press = ChunkPress(inner, chunk_length=20)
    with torch.no_grad():
        if ours:
            prefill(model, context(), press)
        else:
            pressed(model, press)
    assert [call.tokens for call in inner.calls] == [None] * 6


def test_nothing_is_known_while_decoding(random_model: Build) -> None:
    model, inner = random_model(), Reads()
    press, cache = DecodingPress(inner, compression_interval=3, target_size=20), DynamicCache()
    with torch.no_grad(), press(model):
        model(context()[:, :24], past_key_values=cache)
        for token in range(24, 30):
            model(context()[:, token : token + 1], past_key_values=cache)
    assert [call.values.shape[2] for call in inner.calls] == [27, 27, 23, 23]
    assert [call.tokens for call in inner.calls] == [None] * 4


def test_nothing_is_known_of_embeddings(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    pressed(model, press, input_ids=None, inputs_embeds=model.get_input_embeddings()(context()))
    assert [call.tokens for call in press.calls] == [None, None]


def test_ids_may_be_given_by_place(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    with torch.no_grad(), press(model):
        model.model(context(), past_key_values=DynamicCache())
    for call in press.calls:
        check(model, call)


def test_a_press_that_does_not_read_tokens_gets_none(random_model: Build) -> None:
    model, press = random_model(), Blind(0.5)
    pressed(model, press)
    assert [call.tokens for call in press.calls] == [None, None]
    assert pre_hooks(model) == 0
    press.calls.clear()
    with torch.no_grad():
        prefill(model, context(), press)
    assert [(call.tokens, call.press_context.token_ids) for call in press.calls if call.press_context] == [
        (None, None)
    ] * 2


def test_one_hook_however_many_presses_ask_and_gone_with_the_next_forward(random_model: Build) -> None:
    model, seen = random_model(), []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda _, __, kwargs, ___: seen.append(TOKEN_IDS in kwargs), with_kwargs=True
    )
    pressed(model, ComposedPress([Reads(0.5), Reads(0.5)]))
    pressed(model, Reads(0.5))
    assert pre_hooks(model) == 1
    with torch.no_grad():
        model(context())
        assert pre_hooks(model) == 0
        model(context())
    assert seen == [True, True, False, False]


def test_a_full_cache_prefill_carries_no_press_context(random_model: Build) -> None:
    model, seen = random_model(), []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda _, __, kwargs, ___: seen.append(press_context_in(kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        prefill(model, context(), None)
        prefill(model, context(), KnormPress(0.5))
    assert seen[0] is None
    assert isinstance(seen[1], PressContext)
