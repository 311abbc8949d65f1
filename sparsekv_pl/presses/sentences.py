"""Find sentences in token ids, by the text that each id decodes to."""

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
"""SentencePiece's character for the space before a word."""


@dataclass(frozen=True)
class SentenceTable:
    """The ids of one vocabulary that end a sentence, and those that still belong to the sentence before them.

    Both are bool (V,), V = the tokenizer's largest id + 1. An id ends a sentence if its text ends with a mark of
    ``ENDS`` (closing quotes and brackets may follow) or contains an empty line; every special token ends one too. An
    id trails if its text is only such marks or white space.

    The table knows one id at a time: a full stop that is its own id ends a sentence also in ``3.14`` and ``e.g.``, an
    empty line that takes two ids ends none, and neither does an id with a part of a character's bytes.
    """

    ends_V: Tensor
    trails_V: Tensor

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase) -> "SentenceTable":
        """Build the table of ``tokenizer`` by decoding its whole vocabulary once."""
        special, vocabulary = special_ids(tokenizer), list(tokenizer.get_vocab().values())
        ends_V = torch.zeros(max(vocabulary) + 1, dtype=torch.bool)
        trails_V = ends_V.clone()
        texts = {i: text_of(tokenizer, i) for i in vocabulary if i not in special}
        ends_V[[*special, *(i for i, text in texts.items() if ends_sentence(text))]] = True
        trails_V[[i for i, text in texts.items() if trails_sentence(text)]] = True
        return cls(ends_V, trails_V)

    def to(self, device: torch.device) -> "SentenceTable":
        """Return the same table on ``device``."""
        return SentenceTable(self.ends_V.to(device), self.trails_V.to(device))

    def sentences(self, ids: Tensor, place: Tensor, max_tokens: int) -> Tensor:
        """Return the number of each token's sentence in its row, from 0, (B, L) int64.

        Sentences longer than ``max_tokens`` are split. ``ids`` are (B, L) on the table's device. ``place`` (B, L)
        int64 numbers the real tokens of a row from 0 and is -1 at padding, whose sentence numbers have no meaning.
        """
        real = place >= 0
        ends, trails = self.ends_V[ids] & real, self.trails_V[ids]
        # A sentence is complete if its last end mark comes with or after its last word.
        over = _last(ends, place) >= _last(real & ~trails, place)
        starts = real & ~trails & over.roll(1, dims=1) | (place == 0)
        inside = place - _last(starts, place)
        return ((starts | (inside % max_tokens == 0)) & real).cumsum(1).sub(1).clamp(min=0)


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of ``token`` inside a text: decoded alone, a word's first piece loses the space before it."""
    text, piece = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if piece.startswith(WORD_BEGINS) and not text[:1].isspace() else text


def _last(where: Tensor, place: Tensor) -> Tensor:
    """Return for every token (B, L) the place of the last token up to it for which ``where`` is True; else -1."""
    return place.masked_fill(~where, -1).cummax(1).values


def ends_sentence(text: str) -> bool:
    """Return whether ``text`` ends a sentence: a mark of ``ENDS``, then at most closing marks; or an empty line."""
    stripped = text.strip()
    while stripped and _closes(stripped[-1]):
        stripped = stripped[:-1].rstrip()
    return stripped[-1:] in ENDS or "\n\n" in text.replace("\r", "")


def trails_sentence(text: str) -> bool:
    """Return whether ``text`` belongs to the sentence before it: white space, or end and closing marks alone."""
    marks = all(character in ENDS or _closes(character) for character in text.strip())
    return bool(text) and (text.isspace() or (marks and not text[0].isspace()))


def _closes(character: str) -> bool:
    return character in "\"'" or unicodedata.category(character) in ("Pe", "Pf")


def sentence_table(tokenizer: PreTrainedTokenizerBase) -> SentenceTable:
    """Return the tokenizer's table, built again only if tokens were added. A cached call takes some milliseconds."""
    return _table(tokenizer, len(tokenizer), special_ids(tokenizer))


@lru_cache(maxsize=8)
def _table(tokenizer: PreTrainedTokenizerBase, _size: int, _special: frozenset[int]) -> SentenceTable:
    return SentenceTable.build(tokenizer)
