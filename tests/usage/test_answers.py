"""Answers end at every token that ends a text, whichever way they are written, and are drawn at any temperature."""

import pytest

from sparsekv_pl.usage.answers import Sampling, greedy_answers, sampled_answer
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.usage.cache_cases import DOCUMENT, NEW, PRESSES, QUESTIONS


def test_the_tokenizers_end_ends_answers_that_the_generation_config_does_not(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled, greedy, and by transformers' own ``generate``, unless the user's settings name other ends."""
    cache, drawn = ContextCache.prefill(model, DOCUMENT, PRESSES[1]), Sampling(temperature=2.0, seed=1)
    row, length = model.question_ids(QUESTIONS[0]), cache.inputs(QUESTIONS[0])["input_ids"].shape[1]
    whole = sampled_answer(model, cache.kept, row, NEW, drawn)
    (greedy,) = greedy_answers(model, cache.kept, [row], NEW)
    assert len(whole.ids) == len(greedy.ids) == NEW
    ends = {whole.ids[2], greedy.ids[3]}
    monkeypatch.setattr(model, "stop_ids", model.stop_ids | ends)

    def until(ids: list[int]) -> list[int]:
        return ids[: min(place for place, token in enumerate(ids) if token in ends)]

    said: list[str] = []
    cut = sampled_answer(model, cache.kept, row, NEW, drawn, on_text=said.append)
    assert (cut.ids, cut.finish) == (until(whole.ids), "stop")
    assert cut.text == "".join(said) == model.text_of(cut.ids).strip()
    (cut,) = greedy_answers(model, cache.kept, [row], NEW)
    assert cut.ids == until(greedy.ids)
    generated = cache.generate(QUESTIONS[0], max_new_tokens=NEW)[0, length:].tolist()
    assert generated == greedy.ids[: len(cut.ids) + 1]
    for own in ({"generation_config": model.model.generation_config}, {"eos_token_id": [0]}):
        assert cache.generate(QUESTIONS[0], max_new_tokens=NEW, **own)[0, length:].tolist() == greedy.ids


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_the_lowest_temperatures_give_the_most_likely_tokens(model: LoadedModel, temperature: float) -> None:
    cache, row = ContextCache.prefill(model, DOCUMENT, PRESSES[1]), model.question_ids(QUESTIONS[0])
    (greedy,) = greedy_answers(model, cache.kept, [row], NEW)
    assert sampled_answer(model, cache.kept, row, NEW, Sampling(temperature)) == greedy
