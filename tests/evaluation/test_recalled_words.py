"""Which words of a continuation its context alone can tell, worked out by hand on a tiny text."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sparsekv_pl.evaluation.perplexity_and_kl import FullCacheReading
from sparsekv_pl.evaluation.recalled_words import RECENT_TOKENS, recalled_tokens, words_of

CONTEXT = "Old Maria keeps a lantern and two candles under the bridge; the smugglers' flag is there. "
BETWEEN = "It rained. " * 60
RECENT = "Then the bridge fell."
CONTINUATION = " So Maria took the LANTERN, a candle, the flag, the bridge and the lantern, but smugglers"


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, str]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


def test_words_are_those_of_the_text_whatever_their_tokens(tokenizer: Any) -> None:
    text = "x Zwölf Grüße, naïve 日本語の文章 don't_stop 3rdword4 end"
    ids = tokenizer.encode(text)
    found = list(words_of(tokenizer, ids))
    assert [word.text for word in found] == ["zwölf", "grüsse", "naïve", "日本語の文章", "stop", "rdword"]
    for word in found:
        covered = tokenizer.decode(ids[word.first : word.last + 1])
        assert word.text in covered.casefold()
        for fewer in (ids[word.first + 1 : word.last + 1], ids[word.first : word.last]):
            assert word.text not in tokenizer.decode(fewer).casefold()


def recalled(tokenizer: Any, context: str, *continuations: str) -> list[list[str]]:
    """The words whose tokens are marked, for each of the continuations of one context."""
    rows = [tokenizer.encode(text) for text in continuations]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    before = torch.tensor([tokenizer.encode(context)] * len(rows))
    marked = recalled_tokens(tokenizer, before, ids, [len(row) for row in rows])
    assert marked.shape == ids.shape
    return [re.findall(r"\w+", tokenizer.decode(row[mark])) for row, mark in zip(ids, marked, strict=True)]


def test_a_recalled_word_stood_in_the_context_and_not_since(tokenizer: Any) -> None:
    assert len(tokenizer.encode(BETWEEN)) > RECENT_TOKENS
    kept, later, first, none = recalled(
        tokenizer,
        CONTEXT + BETWEEN + RECENT,
        CONTINUATION,
        f"{CONTINUATION}.",
        CONTINUATION.removeprefix(" So"),
        " A Maria, " + "it rained, " * 60 + "Maria again.",
    )
    assert kept == ["Maria", "LANTERN", "flag"], "candle is no candles, the bridge was near, the last may be cut"
    assert later == [*kept, "smugglers"]
    assert first == ["LANTERN", "flag"], "the last token of the context predicts the first"
    assert none == ["Maria"], "the second stood in the continuation, which is never evicted"


def test_nothing_is_recalled_where_all_is_near(tokenizer: Any) -> None:
    assert recalled(tokenizer, CONTEXT, CONTINUATION) == [[]]


def test_the_score_of_recalled_words_is_the_sum_over_their_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, full = (torch.randn(2, 9, 16, generator=generator) for _ in range(2))
    head, ids = torch.randn(50, 16, generator=generator), torch.randint(50, (2, 9), generator=generator)
    marked = torch.zeros(2, 9, dtype=torch.bool)
    marked[0, [1, 2, 8]] = True
    scores = FullCacheReading(full, head, ids, [9, 5], marked).scores(hidden)

    def by_hand(at: Tensor) -> float:
        return -float((hidden[0] @ head.T).log_softmax(-1)[at - 1, ids[0, at]].sum())

    assert scores[0]["recalled_nll"] == pytest.approx(by_hand(torch.tensor([1, 2, 8])), rel=1e-5)
    assert [record["recalled_tokens"] for record in scores] == [3, 0]
    assert scores[1]["recalled_nll"] == 0
