"""Every id has exactly one type; special and punctuation are the same as in anchors."""

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sparsekv_pl.analysis.token_types import TYPES, TokenTypes, stop_words, type_of, types_for
from sparsekv_pl.models.anchors import AnchorTable


@pytest.fixture
def tokenizer(tiny_models: dict[str, str]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.mark.parametrize(
    ("text", "marked", "kind"),
    [
        (" the", False, "stop word"),
        ("the", True, "stop word"),  # SentencePiece: the space is a mark that decoding drops
        ("the", False, "content"),  # a piece of "breathe"
        ("The", False, "stop word"),
        (" THE", False, "stop word"),
        ("THE", False, "content"),
        ("S", False, "content"),
        (" I", False, "stop word"),
        ("'s", False, "stop word"),
        ("\N{RIGHT SINGLE QUOTATION MARK}ll", False, "stop word"),
        (" theory", False, "content"),
        ("7", False, "number"),
        (" 10%", False, "number"),
        ("3.14", False, "number"),
        ("\N{VULGAR FRACTION ONE HALF}", False, "number"),
        ("x1", False, "content"),
        ("2nd", False, "content"),
        (").", False, "punctuation"),
        (" \N{IDEOGRAPHIC FULL STOP}\n", False, "punctuation"),
        ("'", False, "punctuation"),
        ("+", False, "content"),
        (" $", False, "content"),
        ("\N{REPLACEMENT CHARACTER}", False, "content"),
        ("\n\n", False, "whitespace"),
        ("  ", True, "whitespace"),
        ("", False, "whitespace"),
    ],
)
def test_the_type_of_a_text(text: str, marked: bool, kind: str) -> None:
    assert type_of(text, marked, stop_words()) == kind


def test_there_are_179_stop_words_in_lower_case() -> None:
    assert len(stop_words()) == 179
    assert all(word == word.lower() for word in stop_words())


def test_special_and_punctuation_are_those_of_anchors(tokenizer: PreTrainedTokenizerBase) -> None:
    types, anchors = TokenTypes.build(tokenizer), AnchorTable.build(tokenizer)
    assert torch.equal(types.type_V == TYPES.index("special"), anchors.special_V)
    assert torch.equal(types.type_V == TYPES.index("punctuation"), anchors.punctuation_V)
    counts = types.type_V.bincount(minlength=len(TYPES))
    assert counts.sum() == len(tokenizer) and bool((counts > 0).all())


def test_types_of_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "<s>The list of\n  3."
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    kinds = [TYPES[kind] for kind in types_for(tokenizer).of(ids)[0].tolist()]
    pieces = [tokenizer.decode([i]) for i in ids[0].tolist()]
    found = dict(zip(pieces, kinds, strict=True))
    assert found["<s>"] == "special" and found["."] == "punctuation" and found[" of"] == "stop word"
    assert found.get("3", found.get(" 3")) == "number" and "whitespace" in kinds
    assert "content" in kinds


def test_a_table_is_built_once_and_again_with_new_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    before = types_for(tokenizer)
    assert types_for(tokenizer) is before
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    after = types_for(tokenizer)
    assert TYPES[int(after.of(torch.tensor(tokenizer.convert_tokens_to_ids("<turn>"))))] == "special"
    assert torch.equal(after.type_V[: len(before.type_V)], before.type_V)
