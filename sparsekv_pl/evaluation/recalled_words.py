"""Recalled words: words of a continuation that its context alone can tell, because they stood there and not since."""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsekv_pl.models.anchors import special_ids
from sparsekv_pl.presses.sentences import text_of

RECENT_TOKENS = 64
"""A word that stood in so many tokens before it may be repeated from them, and is not recalled."""
WORD = re.compile(r"[^\W\d_]{4,}")
"""Whole words of letters, in any script; shorter ones are mostly grammar."""
BROKEN = "\N{REPLACEMENT CHARACTER}"
"""The text of a token with a part of a character's bytes."""


class Word(NamedTuple):
    """A word of a text, in one case, and its first and last token."""

    text: str
    first: int
    last: int


def recalled_tokens(
    tokenizer: PreTrainedTokenizerBase, context_ids: Tensor, continuation_ids: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Find the tokens of recalled words.

    A word counts if it stood in the context, did not end in the 64 tokens before it, and did not stand earlier in the
    continuation, which no press evicts. Words are compared whole, as they stand in the text (not as tokens), without
    regard to case. There is no list of stop words, which would be one language's: a word that grammar predicts costs
    the same with the full cache, so it shrinks the gap to the full cache of base and trained alike. Words at either end
    of the text may be incomplete and do not count, nor do words with the continuation's first token, which the last
    token of the context predicts.

    Parameters
    ----------
    tokenizer
        The tokenizer of the ids.
    context_ids, continuation_ids
        (B, L) and (B, T) int64.
    lengths
        Number of valid tokens of each continuation.

    Returns
    -------
    Tensor
        (B, T) bool on the continuations' device.
    """
    found = torch.zeros(continuation_ids.shape, dtype=torch.bool)
    context_tokens = context_ids.shape[1]
    for row, (context, continuation) in enumerate(zip(context_ids.tolist(), continuation_ids.tolist(), strict=True)):
        for word in _recalled(words_of(tokenizer, context + continuation[: lengths[row]]), context_tokens):
            found[row, word.first - context_tokens : word.last - context_tokens + 1] = True
    return found.to(continuation_ids.device)


def words_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[Word]:
    """Yield the whole words of the text of ``ids`` in order."""
    text, starts = _text_and_starts(tokenizer, ids)
    for match in WORD.finditer(text):
        begin, end = match.span()
        if begin > 0 and end < len(text) and BROKEN not in (text[begin - 1], text[end]):
            first = bisect_left(starts, starts[bisect_right(starts, begin) - 1])
            yield Word(match[0].casefold(), first, bisect_right(starts, end - 1) - 1)


def _text_and_starts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ``ids`` and each token's first character in it; tokens that share a character share its start."""
    special = special_ids(tokenizer)
    texts = {id_: "\n" if id_ in special else text_of(tokenizer, id_) for id_ in set(ids)}
    parts, starts, letters = [], [], 0
    for broken, run in groupby(ids, lambda id_: BROKEN in texts[id_]):
        for together in [list(run)] if broken else ([id_] for id_ in run):
            part = str(tokenizer.decode(together)) if broken else texts[together[0]]
            starts += [letters] * len(together)
            letters += len(part)
            parts.append(part)
    return "".join(parts), starts


def _recalled(words: Iterator[Word], context_tokens: int) -> Iterator[Word]:
    ends: dict[str, list[int]] = defaultdict(list)
    for word in words:
        before = ends[word.text]
        if before and word.first > context_tokens and before[-1] < min(context_tokens, word.first - RECENT_TOKENS):
            yield word
        before.append(word.last)
