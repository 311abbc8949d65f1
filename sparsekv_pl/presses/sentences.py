"""Where sentences begin and end in token ids, by what each id decodes to."""

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsekv_pl.models.anchors import special_ids

ENDS = frozenset(".!?…‼⁇⁈⁉。．｡！？؟۔।॥։።፧။។៕᙮།")  # noqa: RUF001
"""Full stops, exclamation and question marks: Latin, Chinese and Japanese, Arabic and Urdu, Devanagari, Armenian,
Ethiopic, Burmese, Khmer, Canadian syllabics, Tibetan."""

WORD_BEGINS = "\u2581"
"""How SentencePiece's vocabularies write the space before a word."""


@dataclass(frozen=True)
class SentenceTable:
    """Which ids of one vocabulary end a sentence, and which still belong to the one that has ended.

    Both are bool (V,), V = the tokenizer's largest id + 1. An id ends a sentence if its text ends with a mark of
    ``ENDS``, closing quotes and brackets after it aside, or holds an empty line; every special token ends one too. An
    id trails if it is such marks, or white space, alone.

    The table knows one id at a time: a full stop that is an id of its own ends a sentence in ``3.14`` and ``e.g.`` too,
    an empty line that takes two ids ends none, and neither does an id that holds a part of a character's bytes.
    """

    ends_V: Tensor
    trails_V: Tensor

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase) -> "SentenceTable":
        """Decode the whole vocabulary once."""
        special, vocabulary = special_ids(tokenizer), list(tokenizer.get_vocab().values())
        ends_V = torch.zeros(max(vocabulary) + 1, dtype=torch.bool)
        trails_V = ends_V.clone()
        texts = {i: text_of(tokenizer, i) for i in vocabulary if i not in special}
        ends_V[[*special, *(i for i, text in texts.items() if ends_sentence(text))]] = True
        trails_V[[i for i, text in texts.items() if trails_sentence(text)]] = True
        return cls(ends_V, trails_V)

    def to(self, device: torch.device) -> "SentenceTable":
        """The same table on ``device``."""
        return SentenceTable(self.ends_V.to(device), self.trails_V.to(device))

    def sentences(self, ids: Tensor, place: Tensor, max_tokens: int) -> Tensor:
        """(B, L) int64: the number of each token's sentence in its row, from 0.

        One longer than ``max_tokens`` counts as several. ``ids`` are (B, L) on the table's device. ``place`` (B, L)
        int64 numbers the real tokens of a row from 0 and is -1 at padding, whose sentences mean nothing.
        """
        real = place >= 0
        ends, trails = self.ends_V[ids] & real, self.trails_V[ids]
        # A sentence is over where its last end comes after, or with, its last word.
        over = _last(ends, place) >= _last(real & ~trails, place)
        starts = real & ~trails & over.roll(1, dims=1) | (place == 0)
        inside = place - _last(starts, place)
        return ((starts | (inside % max_tokens == 0)) & real).cumsum(1).sub(1).clamp(min=0)


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What ``token`` stands for inside a text: decoded alone, a piece that begins a word loses the space before it."""
    text, piece = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if piece.startswith(WORD_BEGINS) and not text[:1].isspace() else text


def _last(where: Tensor, place: Tensor) -> Tensor:
    """(B, L): at every token the place of the last one, up to and including it, for which ``where`` holds; else -1."""
    return place.masked_fill(~where, -1).cummax(1).values


def ends_sentence(text: str) -> bool:
    """Whether a sentence is over after ``text``: a mark of ``ENDS``, then closing marks at most; or an empty line."""
    stripped = text.strip()
    while stripped and _closes(stripped[-1]):
        stripped = stripped[:-1].rstrip()
    return stripped[-1:] in ENDS or "\n\n" in text.replace("\r", "")


def trails_sentence(text: str) -> bool:
    """Whether ``text`` belongs to the sentence before it: white space, or final and closing marks with none before."""
    marks = all(character in ENDS or _closes(character) for character in text.strip())
    return bool(text) and (text.isspace() or (marks and not text[0].isspace()))


def _closes(character: str) -> bool:
    return character in "\"'" or unicodedata.category(character) in ("Pe", "Pf")


def sentence_table(tokenizer: PreTrainedTokenizerBase) -> SentenceTable:
    """The tokenizer's table: built once, and again if the tokenizer is given tokens. Asking takes some milliseconds."""
    return _table(tokenizer, len(tokenizer), special_ids(tokenizer))


@lru_cache(maxsize=8)
def _table(tokenizer: PreTrainedTokenizerBase, _size: int, _special: frozenset[int]) -> SentenceTable:
    return SentenceTable.build(tokenizer)
