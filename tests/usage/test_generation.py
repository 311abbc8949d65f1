"""transformers' own generate runs on a kept cache: greedy, sampling, beams, batches, streaming, stop strings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import BasePress
from transformers import GenerationConfig, TextIteratorStreamer

from sparsekv_pl.models.seeding import globally_seeded
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.answer_text import AnswerText
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.usage.cache_cases import DOCUMENT, NEW, PRESSES, QUESTIONS, UNEVEN, bits, document_ids

every_press = pytest.mark.parametrize("press", [*PRESSES, UNEVEN], ids=press_name)


def answers(cache: ContextCache, questions: str | list[str], **settings: Any) -> list[list[int]]:
    """The new tokens of each row, without padding and end."""
    asked = cache.inputs(questions)["input_ids"].shape[1]
    rows = cache.generate(questions, **({"max_new_tokens": NEW} | settings))[:, asked:].tolist()
    ends = cache.model.stop_ids
    return [row[: min([place for place, token in enumerate(row) if token in ends], default=None)] for row in rows]


@every_press
def test_greedy_is_what_ask_answers(model: LoadedModel, press: BasePress | None) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, press)
    before, expected = bits(cache), cache.ask(QUESTIONS, max_new_tokens=NEW)
    assert [model.text_of(row).strip() for row in answers(cache, QUESTIONS)] == expected
    assert [model.text_of(answers(cache, one)[0]).strip() for one in QUESTIONS] == expected
    assert bits(cache) == before


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_of_a_full_cache_are_those_of_the_whole_text(model: LoadedModel, settings: dict[str, int]) -> None:
    cache = ContextCache.prefill(model, DOCUMENT)
    whole = torch.cat([document_ids(model), cache.inputs(QUESTIONS[0])["input_ids"]], dim=1)
    with torch.no_grad():
        expected = model.model.generate(whole, max_new_tokens=NEW, attention_mask=torch.ones_like(whole), **settings)  # type: ignore[operator]
    mine = cache.generate(QUESTIONS[0], max_new_tokens=NEW, **settings)
    assert torch.equal(mine[:, -NEW:], expected[:, -NEW:])


@pytest.mark.parametrize("press", [PRESSES[1], PRESSES[3]], ids=press_name)
def test_samples_follow_the_seed(model: LoadedModel, press: BasePress) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, press)

    def drawn(seed: int) -> list[list[int]]:
        with globally_seeded("test", seed):
            return answers(cache, QUESTIONS[:2], do_sample=True, temperature=2.0, num_return_sequences=2)

    first = drawn(0)
    assert len(first) == 4 and first[0] != first[1]
    assert first == drawn(0) != drawn(1)


def test_the_answer_streams(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, PRESSES[1])
    pieces: list[str] = []
    shown = AnswerText(model.text_of, on_text=pieces.append)
    theirs = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for streamer in (shown, theirs):
        cache.generate(QUESTIONS[0], max_new_tokens=NEW, streamer=streamer)
    expected = cache.ask(QUESTIONS[0], max_new_tokens=NEW)
    assert "".join(pieces) == expected == "".join(theirs).strip()
    assert len(pieces) > 1
    pieces.clear()
    assert cache.ask(QUESTIONS[0], max_new_tokens=NEW, on_text=pieces.append) == expected == "".join(pieces)


def test_stop_strings_end_an_answer(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, PRESSES[1])
    whole = model.text_of(answers(cache, QUESTIONS[0])[0])
    stop = whole[len(whole) // 2 :][:2]
    stopped = model.text_of(answers(cache, QUESTIONS[0], stop_strings=[stop])[0])
    assert stop in stopped and len(stopped) < len(whole)
    pieces: list[str] = []
    assert (
        cache.ask(QUESTIONS[0], max_new_tokens=NEW, stop=[stop], on_text=pieces.append) == whole.split(stop)[0].strip()
    )
    assert "".join(pieces) == whole.split(stop)[0].strip()


def test_settings_that_do_not_go_with_a_kept_cache_are_refused_by_name(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, PRESSES[1])
    for settings in (
        {"past_key_values": None},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"generation_config": GenerationConfig(prefill_chunk_size=4)},
        {"cache_implementation": "static"},
    ):
        name = "prefill_chunk_size" if "generation_config" in settings else next(iter(settings))
        with pytest.raises(ValueError, match=f"^generate: {name}[^\n]+leave it out$"):
            cache.generate(QUESTIONS[0], **settings)
    for settings in (
        {"max_new_tokens": 1000},
        {"max_length": 1000},
        {"generation_config": GenerationConfig(max_new_tokens=1000)},
    ):
        with pytest.raises(ValueError, match=r"takes .* positions, but"):
            cache.generate(QUESTIONS[0], **settings)


def test_the_model_is_left_as_it_was(model: LoadedModel) -> None:
    network = model.model
    cache = ContextCache.prefill(model, DOCUMENT, PRESSES[1])
    before = network.config._attn_implementation
    fails: Callable[..., Any] = lambda *_: 1 / 0  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        cache.generate(QUESTIONS[0], logits_processor=[fails])
    assert network.config._attn_implementation == before
    assert not network.model._forward_pre_hooks
