"""A press is told which tokens stand behind its keys, however it is used, and which keys are padding."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, pipeline

from sparsekv_pl.eviction.chunked import ChunkedEviction
from sparsekv_pl.eviction.prefill import ChunkedPrefill, prefill
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.notes import PressNotes, notes_in
from sparsekv_pl.presses.scores import set_compression_ratio
from sparsekv_pl.presses.tokens import TOKEN_IDS, KeyTokens, ReadsTokens, key_tokens, real_keys

Build = Callable[..., PreTrainedModel]
CONTEXT, CHUNK = 48, 12


@dataclass
class Noted:
    """What a press was told at one layer of one chunk."""

    layer: int
    tokens: KeyTokens | None
    notes: PressNotes | None
    real: Tensor | None
    values: Tensor


@dataclass
class Blind(ScorerPress):
    """Scores each KV head by something else, and notes what it is told."""

    noted: list[Noted] = field(default_factory=list)

    def score(self, module: Any, _: Any, keys: Tensor, values: Tensor, __: Any, kwargs: Any) -> Tensor:
        real = real_keys(keys, kwargs)
        noted = Noted(module.layer_idx, key_tokens(module, keys, kwargs), notes_in(kwargs), real, values.clone())
        self.noted.append(noted)
        return values.sum(-1)


@dataclass
class Reads(ReadsTokens, Blind):
    """The same, and is told the ids."""


def context() -> Tensor:
    """No token twice in a row, so that a layer-0 value tells which token it came from."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(64, generator=generator)[:CONTEXT] for _ in range(2)])


@torch.no_grad()
def pressed(model: PreTrainedModel, press: BasePress, **inputs: Any) -> DynamicCache:
    """As kvpress's pipeline uses a press: one forward of the decoder."""
    cache = DynamicCache()
    with press(model):
        model.model(**({"input_ids": context()} | inputs), past_key_values=cache)
    return cache


@torch.no_grad()
def check(model: PreTrainedModel, noted: Noted, seen: int = CONTEXT) -> None:
    """The ids are those seen so far, and the token of every layer-0 key is the one that its value was made from."""
    assert noted.tokens is not None
    assert torch.equal(noted.tokens.ids, context()[:, :seen])
    assert noted.tokens.positions.shape == noted.values.shape[:3]
    if noted.layer == 0:
        full = prefill(model, context(), None).cache.layers[0].values
        expected = full.gather(2, noted.tokens.positions[..., None].expand_as(noted.values))
        torch.testing.assert_close(noted.values, expected)
        ids = context()[:, None].expand(-1, full.shape[1], -1).gather(-1, torch.cdist(noted.values, full).argmin(-1))
        assert torch.equal(noted.tokens.at_keys(context()[:, :seen]), ids)


def pre_hooks(model: PreTrainedModel) -> int:
    return len(model.model._forward_pre_hooks)


def test_at_keys_reads_a_value_per_token() -> None:
    tokens = KeyTokens(torch.tensor([[7, 8, 9]]), torch.tensor([[[2, 0], [1, 1]]]))
    assert tokens.at_keys(torch.tensor([[0.0, 0.5, 1.0]])).tolist() == [[[1.0, 0.0], [0.5, 0.5]]]


def test_one_chunk(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    with torch.no_grad():
        prefill(model, context(), press)
    assert [noted.layer for noted in press.noted] == [0, 1]
    for noted in press.noted:
        check(model, noted)
        assert torch.equal(noted.tokens.positions, torch.arange(CONTEXT).expand(2, 2, -1))


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.9])
def test_many_chunks(random_model: Build, ratio: float) -> None:
    """At 0.01 the chunks are too short to lose anything at first, and no scorer is asked."""
    model, press = random_model(), Reads(ratio)
    with torch.no_grad():
        prefilled = prefill(model, context(), press, CHUNK)
    ends = {(noted.layer, noted.tokens.ids.shape[1]) for noted in press.noted if noted.tokens is not None}
    assert len(ends) == len(press.noted) >= 2  # every layer of every chunk that evicted, none untold
    for noted in press.noted:
        check(model, noted, noted.tokens.ids.shape[1])
    held = {noted.layer: noted.tokens.positions for noted in press.noted if noted.tokens is not None}
    for layer, positions in prefilled.positions.items():
        for kept, shown in zip(positions[0].tolist(), held[layer][0].tolist(), strict=True):
            assert {place for place in kept if place <= max(shown)} <= set(shown)


def test_chunks_that_lose_nothing_between_chunks_that_do(random_model: Build) -> None:
    """int(seen * 0.97): of 12 tokens 11 stay, of 24 tokens 23, all that is held by then, of 36 tokens 34, of 48 all."""
    model, press = random_model(), Reads(0.03)
    with torch.no_grad():
        prefill(model, context(), press, CHUNK)
    seen = [noted.tokens.ids.shape[1] for noted in press.noted if noted.layer == 0 and noted.tokens is not None]
    assert seen == [12, 36]
    for noted in press.noted:
        check(model, noted, noted.tokens.ids.shape[1])


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
    for noted in press.noted:
        check(model, noted, noted.tokens.ids.shape[1])
    assert [noted.tokens.ids.shape[1] for noted in press.noted[::2]] == [12, 24, 36, 48]


def test_a_replay_tells_what_a_prefill_tells(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    RecordedPrefill(model, context()).evicted(press)
    assert [noted.layer for noted in press.noted] == [0, 1]
    for noted in press.noted:
        check(model, noted)


def test_kvpress_s_own_pipeline(tiny_models: dict[str, str]) -> None:
    model, tokenizer = (kind.from_pretrained(tiny_models["llama"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    asking, press = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu"), Reads(0.5)
    for text in ("The tiger sleeps under the old bridge. " * 6, "Nobody wakes it."):
        asking(text, question="Where?", max_new_tokens=4, press=press)
        for noted in press.noted:
            assert noted.tokens is not None
            assert text in tokenizer.decode(noted.tokens.ids[0])
            assert noted.notes is None
        press.noted.clear()
    assert pre_hooks(model) == 0  # the questions after the context were forwards without a press


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
    assert len(inner.noted) == 2
    for noted in inner.noted:
        check(model, noted)


def test_inside_eviction_aug_press(random_model: Build) -> None:
    model, inner = random_model(), Reads(0.5)
    eviction = ChunkedEviction(EvictionAugPress([KnormPress(), inner], weights=[0, 1]))
    eviction(model, context()[:, :40], context()[:, 40:], compression_ratio=0.5, step=0)
    for noted in inner.noted:
        check(model, noted, 40)


def test_first_and_second_of_composed_presses(random_model: Build) -> None:
    model, first, second = random_model(), Reads(0.5), Reads(0.5)
    pressed(model, ComposedPress([first, second]))
    for noted in first.noted:
        check(model, noted)
    assert [noted.tokens for noted in second.noted] == [None, None]  # nobody says what the first one kept


@pytest.mark.parametrize("ours", [False, True])
def test_parts_of_the_keys_have_no_known_tokens(random_model: Build, ours: bool) -> None:
    model, inner = random_model(), Reads(0.5)
    press = ChunkPress(inner, chunk_length=20)
    with torch.no_grad():
        if ours:
            prefill(model, context(), press)
        else:
            pressed(model, press)
    assert [noted.tokens for noted in inner.noted] == [None] * 6


def test_nothing_is_known_while_decoding(random_model: Build) -> None:
    model, inner = random_model(), Reads()
    press, cache = DecodingPress(inner, compression_interval=3, target_size=20), DynamicCache()
    with torch.no_grad(), press(model):
        model(context()[:, :24], past_key_values=cache)
        for token in range(24, 30):
            model(context()[:, token : token + 1], past_key_values=cache)
    assert [noted.values.shape[2] for noted in inner.noted] == [27, 27, 23, 23]
    assert [noted.tokens for noted in inner.noted] == [None] * 4


def test_nothing_is_known_of_embeddings(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    pressed(model, press, input_ids=None, inputs_embeds=model.get_input_embeddings()(context()))
    assert [noted.tokens for noted in press.noted] == [None, None]


def test_ids_may_be_given_by_place(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    with torch.no_grad(), press(model):
        model.model(context(), past_key_values=DynamicCache())
    for noted in press.noted:
        check(model, noted)


def test_a_press_that_does_not_ask_is_not_told(random_model: Build) -> None:
    model, press = random_model(), Blind(0.5)
    pressed(model, press)
    assert [noted.tokens for noted in press.noted] == [None, None]
    assert pre_hooks(model) == 0
    press.noted.clear()
    with torch.no_grad():
        prefill(model, context(), press)
    assert [(noted.tokens, noted.notes.token_ids) for noted in press.noted if noted.notes] == [(None, None)] * 2


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


def test_the_hook_survives_forwards_under_the_press_and_comes_back_with_it(random_model: Build) -> None:
    model, press = random_model(), Reads(0.5)
    with torch.no_grad(), press(model):
        for _ in range(3):
            model.model(context(), past_key_values=DynamicCache())
        assert pre_hooks(model) == 1
    assert len(press.noted) == 6
    with torch.no_grad():
        model(context())
    press.noted.clear()
    pressed(model, press)
    for noted in press.noted:
        check(model, noted)


def test_a_full_cache_prefill_carries_no_notes(random_model: Build) -> None:
    model, seen = random_model(), []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda _, __, kwargs, ___: seen.append(notes_in(kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        prefill(model, context(), None)
        prefill(model, context(), KnormPress(0.5))
    assert seen[0] is None
    assert isinstance(seen[1], PressNotes)


PADDED = torch.ones(2, CONTEXT, dtype=torch.long)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("hidden", [slice(0, 5), slice(-5, None)], ids=["left", "right"])
def test_padding_is_read_off_the_mask(random_model: Build, implementation: str, hidden: slice) -> None:
    model, press, mask = random_model(), Blind(0.5), PADDED.clone()
    model.set_attn_implementation(implementation)
    mask[1, hidden] = 0
    pressed(model, press, attention_mask=mask)
    for noted in press.noted:
        assert noted.real is not None
        assert torch.equal(noted.real, mask.bool())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, PADDED])
def test_no_padding_is_none(random_model: Build, implementation: str, mask: Tensor | None) -> None:
    model, press = random_model(), Blind(0.5)
    model.set_attn_implementation(implementation)
    pressed(model, press, attention_mask=mask)
    assert [noted.real for noted in press.noted] == [None, None]
    with torch.no_grad():
        prefill(model, context(), press, CHUNK)
    assert [noted.real for noted in press.noted] == [None] * 10


def test_a_mask_of_two_dimensions_is_taken_as_it_is() -> None:
    """As flash attention is given."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    real = real_keys(torch.zeros(2, 1, 3, 4), {"attention_mask": mask})
    assert real is not None
    assert real.tolist() == [[False, True, True], [True, True, True]]


def test_padding_cannot_be_told_once_another_press_has_evicted(random_model: Build) -> None:
    mask = PADDED.clone()
    mask[1, :5] = 0
    with pytest.raises(ValueError, match="put this press first"):
        pressed(random_model(), ComposedPress([Blind(0.5), Blind(0.5)]), attention_mask=mask)


def test_each_part_of_the_keys_has_its_own_padding(random_model: Build) -> None:
    inner, mask = Blind(0.5), PADDED.clone()
    mask[1, :5], mask[0, -3:] = 0, 0
    pressed(random_model(), ChunkPress(inner, chunk_length=20), attention_mask=mask)
    told = [noted.real for noted in inner.noted]
    for layer in (told[:3], told[3:]):
        assert torch.equal(torch.cat(layer, dim=1), mask.bool())
