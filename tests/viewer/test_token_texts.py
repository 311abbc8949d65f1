"""Tokens as texts: joined they are the text, characters of several tokens included, and answers are found in them."""

from typing import Any

import pytest

from sparsekv_pl.viewer.token_texts import spans_of, token_texts
from tests.data.tiny_tokenizers import CHINESE, ENGLISH, byte_level, sentencepiece


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "smile 🙂 and \ufffd on.\n\n  x"])
def test_joined_they_are_the_text(make: Any, text: str) -> None:
    tokenizer = make([ENGLISH])
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if text is ENGLISH:
        assert all(texts), "every token of it has letters"


def test_answers_are_found_where_they_stand() -> None:
    texts = ["the", " box", " 48", "213", ", not", " 148213", " nor", " BOX", "es"]
    assert spans_of(texts, ["48213"]) == [(2, 4)]
    assert spans_of(texts, ["box", " 48213 ", "", "gone"]) == [(1, 2), (2, 4)]
    assert spans_of(texts, ["boxes"]) == [(7, 9)]
    assert spans_of(["一", "二三"], ["二"]) == [(1, 2)]
