"""Haystacks: exact lengths and depths, streamed text that is never repeated unless asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.long_haystack import PIECE_CHARACTERS, HaystackData
from data.needles import needle_ids
from data.packing import JOINT
from data.text import Document, EmbeddedText, TextSource
from sparsekv_pl.models.batch import CaseBatch

DEPTHS = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass
class Given(TextSource):
    """Documents of these texts."""

    texts: Sequence[str] = ()

    def documents(self) -> Any:
        """With numbers as ids."""
        return (Document(f"given/{number}", text) for number, text in enumerate(self.texts))


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, str]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


def made(tokenizer: Any, **settings: Any) -> HaystackData:
    data = HaystackData(**({"text": EmbeddedText(), "tokens": 5000, "depths": DEPTHS} | settings))
    data.tokenizer = tokenizer
    data.setup("test")
    return data


def only(data: HaystackData) -> CaseBatch:
    (batch,) = data.test_dataloader()
    return batch


def without_needles(data: HaystackData, batch: CaseBatch) -> tuple[list[int], list[int]]:
    """Return the filler's tokens, and the number of them before each needle."""
    facts, needles, room = data._room(batch["context_ids"].shape[1], [case.depth for case in batch["cases"]])
    ids = batch["context_ids"][0].tolist()[len(data.frame.prefix_ids) :]
    assert [(fact.value,) for fact in facts] == [case.answers for case in batch["cases"]]
    places, filler = {}, []
    while ids:
        # A needle is at its place only once: facts differ.
        found = next((i for i, needle in enumerate(needles) if i not in places and ids[: len(needle)] == needle), None)
        if found is None:
            filler.append(ids.pop(0))
        else:
            places[found] = len(filler)
            ids = ids[len(needles[found]) :]
    assert len(filler) == room
    return filler, [places[i] for i in range(len(needles))]


@pytest.mark.parametrize("tokens", [500, 5000])
def test_length_and_depths_are_exact(tokenizer: Any, tokens: int) -> None:
    data = made(tokenizer, tokens=tokens)
    batch = only(data)
    assert batch["context_ids"].shape == (1, tokens)
    assert batch["context_ids"][0, : len(data.frame.prefix_ids)].tolist() == data.frame.prefix_ids
    filler, places = without_needles(data, batch)
    assert places == [round(depth * len(filler)) for depth in DEPTHS]
    assert [case.depth for case in batch["cases"]] == list(DEPTHS)


def test_the_filler_is_the_documents_one_after_the_other(tokenizer: Any) -> None:
    data = made(tokenizer)
    batch = only(data)
    texts = {document.id: document.text for document in EmbeddedText().documents()}
    names = batch["cases"][0].document_ids
    assert len(set(names)) == len(names) > 1
    joined = "".join(texts[name] + JOINT for name in names)
    filler, _ = without_needles(data, batch)
    assert joined.startswith(tokenizer.decode(filler[:-5]))


def test_every_case_says_where_its_needle_stands(tokenizer: Any) -> None:
    data = made(tokenizer, depths=(0.9, 0.0, 0.5, 0.51))  # in any order
    batch = only(data)
    _, needles, _ = data._room(batch["context_ids"].shape[1], data.depths)
    for case, needle in zip(batch["cases"], needles, strict=True):
        assert case.needle_span is not None
        start, end = case.needle_span
        assert batch["context_ids"][0, start:end].tolist() == needle


def test_each_needle_is_asked_for_in_held_out_words(tokenizer: Any) -> None:
    data = made(tokenizer)
    batch = only(data)
    facts = data._room(5000, data.depths)[0]
    for row, (fact, case) in enumerate(zip(facts, batch["cases"], strict=True)):
        length = int(batch["continuation_lengths"][row])
        asked = tokenizer.decode(batch["continuation_ids"][row, :length])
        assert asked == f"\n\n{fact.question}{data.frame.question_suffix}{fact.answer_prefix}"
        assert case.max_new_tokens > len(tokenizer.encode(f" {fact.value}"))
        assert fact.value in fact.statement
        assert len(needle_ids(data.frame, fact)) > 3
    assert len({fact.subject for fact in facts}) == len({case.id for case in batch["cases"]}) == 5


def test_the_same_seed_makes_the_same_haystack_and_another_seed_another(tokenizer: Any) -> None:
    first, again, other = (only(made(tokenizer, seed=seed)) for seed in (0, 0, 1))
    assert first["context_ids"].equal(again["context_ids"])
    assert first["cases"] == again["cases"]
    assert not first["context_ids"].equal(other["context_ids"])
    assert first["cases"][0].document_ids != other["cases"][0].document_ids


def test_lengths_make_a_haystack_each(tokenizer: Any) -> None:
    batches = list(made(tokenizer, lengths=[700, 300]).test_dataloader())
    assert [batch["context_ids"].shape[1] for batch in batches] == [700, 300]


def test_apart_every_depth_has_a_context_with_its_needle_alone(tokenizer: Any) -> None:
    together, apart = (made(tokenizer, together=together, depths=(0.2, 0.8)) for together in (True, False))
    both, single = only(together), list(apart.test_dataloader())
    assert [batch["context_ids"].shape[1] for batch in single] == [both["context_ids"].shape[1]] * 2
    for batch, case in zip(single, both["cases"], strict=True):
        (alone,) = batch["cases"]
        assert (alone.depth, alone.answers, alone.question) == (case.depth, case.answers, case.question)
        assert alone.task == "single needle" and alone.id != case.id
        text, (other,) = tokenizer.decode(batch["context_ids"][0]), [one for one in both["cases"] if one is not case]
        assert alone.answers[0] in text
        assert other.answers[0] not in text
        filler, at = without_needles(apart, batch)
        assert at == [round(alone.depth * len(filler))]


def test_a_long_document_is_tokenised_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(tokenizer, text=Given(["a word and another, " * 20_000]), tokens=20_000)
    longest, encode = 0, data.frame.encode

    def watched(text: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(text)

    monkeypatch.setattr(data.frame, "encode", watched)
    data.haystack(20_000, data.depths)
    assert longest == PIECE_CHARACTERS


def test_a_text_that_is_too_short_says_how_long_it_is(tokenizer: Any) -> None:
    texts = ["one short text", "and another one"]
    tokens = sum(len(tokenizer.encode(text + JOINT)) for text in texts)
    with pytest.raises(ValueError, match=f"the text has {tokens} tokens and .* are needed.*repeat: true"):
        only(made(tokenizer, text=Given(texts)))


def test_repeated_text_comes_in_a_new_order_and_is_named(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    data = made(tokenizer, text=Given([f"{word} " * 30 for word in words]), tokens=4000, depths=(0.5,), repeat=True)
    batch = only(data)
    filler, _ = without_needles(data, batch)
    orders = [word for word in tokenizer.decode(filler).split("\n\n") if word.strip()]
    rounds = [[part.split()[0] for part in orders[i : i + 6]] for i in range(0, 12, 6)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(words)
    assert rounds[0] != rounds[1]
    task = batch["cases"][0].task
    assert task.startswith("haystack, text ")
    times = int(task.split()[2])
    assert f"are used {times} times" in caplog.text
    assert (times - 1) * 6 < len(orders) <= times * 6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": 60}, r"5 needle\(s\) of .* leave no room for text in a context of 60 tokens"),
        ({"tokens": 0}, "tokens is 0: a context has at least 1 token"),
        ({"lengths": [300, 0]}, "lengths has 0: a context has at least 1 token"),
        ({"lengths": []}, "lengths is empty: give at least one"),
        ({"lengths": [300, 300]}, "lengths has 300 more than once"),
        ({"depths": []}, "depths is empty: give at least one"),
        ({"depths": [0.5, 0.5]}, r"depths has 0\.50 more than once"),
        ({"depths": [0.991, 0.992]}, r"depths has 0\.99 more than once"),
        ({"depths": [1.5]}, r"depths has 1\.5: give fractions"),
    ],
)
def test_bad_settings_are_refused_before_text_is_read(tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tokenizer, **settings)


def test_an_empty_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="has no document"):
        only(made(tokenizer, text=Given([])))
