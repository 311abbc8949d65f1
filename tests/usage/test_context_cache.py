"""A document is read once, and every question meets its cache untouched: answers are those of the slow way."""

from collections.abc import Sequence

import kvpress
import pytest
import torch
from kvpress import BasePress, KeyDiffPress, KeyRerotationPress, KnormPress, SnapKVPress, ThinKPress

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.presses import BlockDropoutPress, EvictionAugPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel
from sparsekv_pl.usage.usable_press import check_usable
from tests.presses.test_traits import ROWS
from tests.usage.cache_cases import DOCUMENT, NEW, PRESSES, QUESTIONS, UNEVEN, bits, document_ids, slowly


@pytest.mark.parametrize("press", [*PRESSES, UNEVEN], ids=press_name)
def test_answers_one_by_one_and_as_a_batch_are_those_of_the_slow_way(
    model: LoadedModel, press: BasePress | None
) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, press)
    before = bits(cache)
    expected = [model.text_of(slowly(model, press, model.question_ids(question))).strip() for question in QUESTIONS]
    assert any(expected)
    assert cache.ask(QUESTIONS, max_new_tokens=NEW) == expected
    assert [cache.ask(question, max_new_tokens=NEW) for question in reversed(QUESTIONS)] == expected[::-1]
    assert bits(cache) == before


@pytest.mark.parametrize("press", PRESSES[1:], ids=press_name)
def test_one_chunk_or_many_keep_what_the_evaluations_prefill_keeps(model: LoadedModel, press: BasePress) -> None:
    ids = document_ids(model)
    for chunk_tokens, budget in [(None, None), (16, None), (16, 12)]:
        cache = ContextCache.prefill(model, DOCUMENT, press, chunk_tokens=chunk_tokens, budget=budget)
        with torch.no_grad():
            expected = prefill(model.model, ids, press, chunk_tokens, budget)
        assert cache.kept.next_position == expected.next_position and cache.tokens == ids.shape[1]
        for layer, kept in enumerate(cache.kept.each("keys")):
            reference = expected.cache.layers[layer].keys
            assert reference is not None and kept.shape == reference.shape
            order = [row.sum(-1).argsort(stable=True)[..., None].expand_as(row) for row in (kept, reference)]
            assert torch.equal(kept.gather(2, order[0]), reference.gather(2, order[1]))
        assert cache.kept_pairs == min(ids.shape[1] // 2, budget or ids.shape[1])


def test_positions_say_which_tokens_stayed(model: LoadedModel) -> None:
    cache, full = (ContextCache.prefill(model, DOCUMENT, press) for press in (KnormPress(0.5), None))
    kept, values, positions = (cache.kept.each(kind)[0] for kind in ("keys", "values", "positions"))
    index = positions[..., None].expand_as(kept)
    assert torch.equal(full.kept.each("keys")[0].gather(2, index), kept)
    assert torch.equal(full.kept.each("values")[0].gather(2, index), values)


def test_bytes_beside_the_planners(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, KeyDiffPress(0.75))
    planned = cache.plan()
    assert cache.kv_bytes == planned.kv_bytes_kept < planned.kv_bytes_full / 3
    assert planned.kv_bytes_full == ContextCache.prefill(model, DOCUMENT).kv_bytes


def test_presses_that_cannot_make_a_cache_are_refused_by_name() -> None:
    refused = set()
    for press, *_ in ROWS:
        try:
            check_usable(press)
        except ValueError as error:
            assert str(error).startswith(press_name(press))
            refused.add(press_name(press).partition("(")[0])
    masks = "AdaKV CriticalAdaKV DMS DuoAttention FastKVzip KVgrad KVzip LUKV RestoreKV".split()
    generating = "CAM CompressionRatioDecoding Decoding PrefillDecoding".split()
    trains = "AdaptiveBlockDropout BlockDropout SentenceDropout SparseReg VariableBlock EvictionAug".split()
    assert refused == {*masks, *generating, *trains, "Finch", "Oracle"}


@pytest.mark.parametrize(
    "press, reason",
    [
        (kvpress.AdaKVPress(KnormPress(0.5)), "AdaKV.Knorm. hides pairs per head and leaves them in memory"),
        (kvpress.FinchPress(0.5), "Finch selects by the question"),
        (kvpress.DecodingPress(KnormPress()), "Decoding.Knorm. evicts while tokens are generated"),
        (BlockDropoutPress(0.5), "BlockDropout evicts only in training"),
        (EvictionAugPress([KnormPress(0.5), KeyDiffPress(0.5)]), "EvictionAug.Knorm. draws another press"),
        (kvpress.ObservedAttentionPress(0.5), "ObservedAttention reads attention weights"),
    ],
    ids=lambda value: press_name(value) if isinstance(value, BasePress) else "",
)
def test_the_reason_is_named_before_anything_is_read(model: LoadedModel, press: BasePress, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}[^\n]+$"):
        ContextCache.prefill(model, DOCUMENT, press)


@pytest.mark.parametrize(
    "document, settings, message",
    [
        ("", {}, "the document is empty"),
        ([], {}, "the document is empty"),
        ("a " * 2000, {}, "takes .* positions, but this model was trained on 1024"),
        (DOCUMENT, {"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
        (DOCUMENT, {"budget": 8}, "budget=8 needs a press"),
        (DOCUMENT, {"press": KnormPress(0.5), "budget": -1}, "budget=-1 must be at least 1"),
        (DOCUMENT, {"press": SnapKVPress(0.5), "chunk_tokens": 16}, "SnapKV looks at a window of 64"),
        (DOCUMENT, {"press": ThinKPress(0.5, window_size=4), "chunk_tokens": 16}, "ThinK has no compression_ratio"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    model: LoadedModel, document: str | Sequence[int], settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ContextCache.prefill(model, document, **settings)
    assert "\n" not in str(error.value)


def test_token_ids_are_asked_as_they_are(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, document_ids(model)[0].tolist(), KnormPress(0.5))
    expected = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5)).ask(QUESTIONS, max_new_tokens=NEW)
    ids = [model.question_ids(question) for question in QUESTIONS]
    assert cache.ask(ids, max_new_tokens=NEW) == expected
    assert cache.ask(ids[0], max_new_tokens=NEW) == expected[0]
    assert cache.inputs(ids[0])["input_ids"].tolist() == [ids[0]]


def test_token_ids_that_the_model_does_not_have_are_refused(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT)
    for wrong in (-1, len(model.model.get_input_embeddings().weight)):
        for use in (lambda ids: ContextCache.prefill(model, ids), cache.ask, cache.append, cache.generate):
            with pytest.raises(ValueError, match=f"^there is no token {wrong}: this model has 0 to "):
                use([5, wrong])


def test_one_stop_string_may_stand_alone(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    whole = cache.ask("Why?", max_new_tokens=NEW)
    stop = whole[len(whole) // 2 :][:2]
    assert cache.ask("Why?", max_new_tokens=NEW, stop=stop) == whole.split(stop)[0].strip() != whole
    assert cache.ask("Why?", max_new_tokens=NEW, stop=f"{stop}never") == whole


def test_what_cannot_be_asked_is_one_line(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    for message, wrong in {
        "a question is empty: give some text": lambda: cache.ask(" "),
        "a question is empty: give at least one token": lambda: cache.ask([[5], []]),
        "there is no question": lambda: cache.ask([]),
        "a stop string is empty": lambda: cache.ask("Why?", stop=["a", ""]),
        "max_new_tokens=0": lambda: cache.ask("Why?", max_new_tokens=0),
        "on_text shows one answer": lambda: cache.ask(QUESTIONS, on_text=print),
        "takes .* positions, but": lambda: cache.ask("Why?", max_new_tokens=1000),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


def test_re_rotated_keys_free_positions(model: LoadedModel) -> None:
    press = KeyRerotationPress(KeyDiffPress(0.5))
    cache = ContextCache.prefill(model, DOCUMENT * 20, press, chunk_tokens=64, budget=32)
    assert cache.tokens > 1024 and cache.kept.next_position == cache.kept_pairs == 32
    assert cache.ask("Why?", max_new_tokens=NEW) is not None


def test_a_masking_that_ran_before_does_not_reach_the_questions(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    expected = cache.ask(QUESTIONS, max_new_tokens=NEW)
    with torch.no_grad():
        prefill(model.model, document_ids(model), kvpress.AdaKVPress(KnormPress(0.9)))
    assert cache.ask(QUESTIONS, max_new_tokens=NEW) == expected


def test_progress_moves_with_every_layer_of_a_chunk(model: LoadedModel) -> None:
    reached: list[tuple[int, ...]] = []
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5), report=lambda *done: reached.append(done))
    assert reached == [(cache.tokens // 2, cache.tokens), (cache.tokens, cache.tokens)]
    appended = cache.append(DOCUMENT, lambda *done: reached.append(done))
    assert reached[-1] == (appended.tokens, appended.tokens) and len(reached) == 4
    assert not any(layer._forward_hooks for layer in model.model.model.layers)
