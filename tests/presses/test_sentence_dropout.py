"""Whole sentences are dropped, and sentences end where they do in real text."""

from typing import Any

import pytest
import torch
from kvpress import ChunkPress, ComposedPress, KnormPress, PerLayerCompressionPress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.presses.sentence_dropout import SentenceDropoutPress
from sparsekv_pl.presses.sentences import ends_sentence, sentence_table, trails_sentence
from tests.random_models import Build

TEXT = [
    'He said: "Go away!"',
    " She did not (who would?).",
    " It rained... and then it stopped.",
    ' "Why now?"',
    " she asked (twice?!).\n\n",
    "The values are 3 and 5; nothing else matters.",
]


@pytest.fixture(scope="session")
def tokenizer(tiny_models: dict[str, str]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.fixture
def model(random_model: Build) -> PreTrainedModel:
    return random_model(vocab_size=1024).train()


def press_with(tokenizer: Any, ratio: float = 0.5, **settings: Any) -> SentenceDropoutPress:
    press = SentenceDropoutPress(ratio, **{"protect_start": 2, "protect_recent": 5} | settings)
    press.tokenizer = tokenizer
    return press


def ids_of(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def numbers(tokenizer: Any, ids: Tensor, max_tokens: int = 1000) -> Tensor:
    place = torch.arange(ids.shape[1]).expand_as(ids)
    return sentence_table(tokenizer).sentences(ids, place, max_tokens)


def pieces(tokenizer: Any, ids: Tensor, max_tokens: int = 1000) -> list[str]:
    """One row's text, cut where another sentence begins."""
    row = numbers(tokenizer, ids, max_tokens)[0]
    return [tokenizer.decode(ids[0][row == number]) for number in row.unique()]


def test_real_sentences_are_found(tokenizer: Any) -> None:
    found = pieces(tokenizer, ids_of(tokenizer, "".join(TEXT)))
    dots = ["It rained...", "and then it stopped."]  # a mark in a sentence reads as its end
    expected = [TEXT[0], "She did not (who would?).", *dots, *TEXT[3:]]
    assert [piece.strip() for piece in found] == [piece.strip() for piece in expected]


def test_special_tokens_end_a_sentence(tokenizer: Any) -> None:
    assert pieces(tokenizer, ids_of(tokenizer, "<s>user\nWho are you</s><s>no one. I")) == [
        "<s>",
        "user\nWho are you</s>",
        "<s>",
        "no one.",
        " I",
    ]


def test_scripts_other_than_latin() -> None:
    words = ["你好", "。", "是吗", "？", "」", "हाँ", "।", "نعم", "؟", "Այո", "։", "no", ",", "[U]"]  # noqa: RUF001
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[U]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = torch.arange(len(words) - 1)[None]
    assert numbers(tokenizer, ids)[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_what_one_text_says() -> None:
    ends = [".", " end!", '?"', "。", ".)\n", "…", "x\n\n", "\r\n\r\ny", '!")', "!' "]
    assert all(ends_sentence(text) for text in ends)
    assert not any(ends_sentence(text) for text in ["", " ", "\n", ",", ":", ". The", "a", '"', ")", ".5", "\ufffd"])
    assert all(trails_sentence(text) for text in ['"', ")", "»", " ", "\n\n", "')", ").", "?!"])
    assert not any(trails_sentence(text) for text in ["", ' "', " (", "(", " .", "a.", "“"])


def test_a_long_sentence_is_split_and_the_next_starts_anew(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "".join(TEXT))
    whole, split = numbers(tokenizer, ids)[0], numbers(tokenizer, ids, 4)[0]
    for number in whole.unique():
        lengths = split[whole == number].unique(return_counts=True)[1].tolist()
        assert all(length == 4 for length in lengths[:-1]) and lengths[-1] <= 4
    assert len(split.unique()) == sum(-(-int(n) // 4) for n in whole.bincount())


@torch.no_grad()
def kept(model: PreTrainedModel, press: Any, ids: Tensor) -> Tensor:
    """Return (layers, B, K, S) bool, True for keys of the full cache that are in the evicted cache."""
    caches = DynamicCache(), DynamicCache()
    model.model(input_ids=ids, past_key_values=caches[0])
    with press(model):
        model.model(input_ids=ids, past_key_values=caches[1])
    pairs = zip(*(cache.layers for cache in caches), strict=True)
    return torch.stack([(full.keys[:, :, :, None] == left.keys[:, :, None]).all(-1).any(-1) for full, left in pairs])


def test_parts_of_a_context_are_refused(model: PreTrainedModel, tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "".join(TEXT))
    unfit = [ChunkPress(press_with(tokenizer), 20), ComposedPress([KnormPress(0.5), press_with(tokenizer)])]
    for press in unfit:
        with pytest.raises(ValueError, match=r"SentenceDropoutPress .*BlockDropoutPress"), press(model):
            model.model(input_ids=ids, past_key_values=DynamicCache())


def test_many_chunks_know_the_context_s_sentences(model: PreTrainedModel, tokenizer: Any) -> None:
    """A sentence that begins in one chunk and ends in the next is one, and evicted ones keep their numbers."""
    ids = ids_of(tokenizer, "".join(TEXT))
    press, seen = press_with(tokenizer, protect_recent=2), []
    known = press.spans
    press.spans = lambda shown: (seen.append(known(shown)), seen[-1])[1]  # type: ignore[method-assign]
    with torch.no_grad():
        done = prefill(model, ids, press, chunk_tokens=16, budget=20)
    assert {kept.shape[-1] for kept in done.positions.values()} == {20}
    assert len(seen) > 4
    sentence = numbers(tokenizer, ids)[0]
    for layer in range(2):
        last = seen[-2 + layer]  # what the last chunk saw holds all that stayed
        for head in range(2):
            kept_sentences = sentence[done.positions[layer][0, head]]
            assert set(kept_sentences.tolist()) <= set(last[0, head].tolist())
    result = RealEviction(press, chunk_tokens=16)(model, ids, ids[:, :6], compression_ratio=0.5, step=2)
    result.hidden.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.parameters() if p.grad is not None)


def test_the_tokenizer_beside_the_model_is_found(tiny_models: dict[str, str], tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).train()
    ids = ids_of(tokenizer, "".join(TEXT))
    found = SentenceDropoutPress(0.5, protect_start=2, protect_recent=5)
    assert torch.equal(kept(model, found, ids), kept(model, press_with(tokenizer), ids))
    assert found.tokenizer is None  # on another model it would be another


def test_a_model_without_a_tokenizer_says_what_to_do(model: PreTrainedModel, tmp_path: Any) -> None:
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(ValueError, match=r"press\.tokenizer = "), SentenceDropoutPress(0.5)(model):
        pass
    model.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*press\.tokenizer = "), SentenceDropoutPress(0.5)(alone):
        pass


def test_a_piece_that_begins_a_word_begins_a_sentence() -> None:
    """SentencePiece's opening quote: decoded alone it looks like a closing one."""
    words = ["<s>", "\u2581He", "\u2581left", ".", '\u2581"', "Go", "\u2581now", '"', "\u2581she"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 3, 7, 8]])
    assert numbers(tokenizer, ids).tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2]]


def test_a_wrapper_that_never_shows_the_model_is_named(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"SentenceDropoutPress does not know the tokenizer"):
        prefill(
            model, torch.zeros(1, 48, dtype=torch.long), PerLayerCompressionPress(SentenceDropoutPress(), [0.5, 0.5])
        )
