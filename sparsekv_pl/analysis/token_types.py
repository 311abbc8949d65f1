"""Types of tokens: special, punctuation, stop word, content, number or white space."""

import unicodedata
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsekv_pl.models.anchors import is_punctuation, special_ids

TYPES = ("special", "punctuation", "stop word", "content", "number", "whitespace")
CONTENT = "content"

WORD_MARKS = "Ġ▁"
"""Characters for the space before a word in byte-level BPE and SentencePiece."""
APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"


@dataclass(frozen=True)
class TokenTypes:
    """The type of every id of one vocabulary: ``type_V`` int64 (V,), V = the largest id + 1, an index into ``TYPES``.

    Each id has one type, the first of these that fits. Special and punctuation are defined as in
    ``anchors.AnchorTable``, so results for a type hold for the anchors of that kind.

    special
        The tokenizer's special tokens.
    whitespace
        No visible character.
    punctuation
        Only characters of Unicode's P categories.
    number
        Numerals with optional punctuation and symbols, and no letter ("7", "10%", "3.14", "½").
    stop word
        A token that begins a word and is one of bm25s's 179 English function words, in any case ("the",
        "Of", "'s").
    content
        Everything else: words, parts of words, symbols (``+`` and ``$`` carry meaning in code, and are not punctuation
        in ``AnchorTable`` either), and parts of a character's bytes.

    Limits: stop words are English, so none is found in other languages. The table ignores context: a token begins a
    word if it has the tokenizer's space or an apostrophe in front ("'s", "'ll"), or is capitalised ("The"). Therefore
    "the" at the start of a line and a stop word split into pieces are content, and a variable named ``t`` after a space
    is a stop word.
    """

    type_V: Tensor

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenTypes":
        """Decode the whole vocabulary and classify it."""
        special, words = special_ids(tokenizer), stop_words()
        vocabulary = tokenizer.get_vocab()
        types = [TYPES.index(CONTENT)] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            text = str(tokenizer.decode([number]))
            kind = "special" if number in special else type_of(text, str(token)[:1] in set(WORD_MARKS), words)
            types[number] = TYPES.index(kind)
        return cls(torch.tensor(types))

    def of(self, ids: Tensor) -> Tensor:
        """The types of ids of any shape, as indices into ``TYPES``, on the ids' device."""
        return self.type_V.to(ids.device)[ids]


def type_of(text: str, marked: bool, words: AbstractSet[str]) -> str:
    """The type of a token that is not special: ``text`` is the decoded token; ``marked``: it begins with a space.

    >>> [type_of(text, False, {"the"}) for text in (" the", "the", "The", ").", "1,5", "+", "\\n")]
    ['stop word', 'content', 'stop word', 'punctuation', 'number', 'content', 'whitespace']
    """
    word = text.strip()
    if not word:
        return "whitespace"
    if is_punctuation(word):
        return "punctuation"
    kinds = {unicodedata.category(character)[0] for character in word}
    if "N" in kinds and kinds <= {"N", "P", "S"}:
        return "number"
    begins = marked or text[0].isspace() or word[0] in APOSTROPHES or (len(word) > 1 and word.istitle())
    return "stop word" if begins and word.lstrip(APOSTROPHES).lower() in words else CONTENT


def stop_words() -> frozenset[str]:
    """English function words in lower case, from bm25s (NLTK's list)."""
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)


def types_for(tokenizer: PreTrainedTokenizerBase) -> TokenTypes:
    """The tokenizer's table, cached until the tokenizer's vocabulary changes."""
    return _types(tokenizer, len(tokenizer), special_ids(tokenizer))


@lru_cache(maxsize=8)
def _types(tokenizer: PreTrainedTokenizerBase, _size: int, _special: frozenset[int]) -> TokenTypes:
    return TokenTypes.build(tokenizer)
