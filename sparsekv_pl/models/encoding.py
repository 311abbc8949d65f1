"""Encode parts of a text as parts of the whole: without a prefix of their own, and without cutting characters."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

BEFORE = ("\n", "a", "0", ".")
"""Strings that a text is encoded after and that are cut off again: the first one that shares no token with it."""


class Encoder:
    """An encoder of text in the middle of a text.

    Tokenizers of the SentencePiece family put a space (the dummy prefix) in front of their input. It belongs only to
    the beginning of a text: in front of each part it would be a token that the whole text does not have.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def start(self, text: str) -> list[int]:
        """Encode the beginning of a text, without adding special tokens (those written in it are encoded)."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode(self, text: str) -> list[int]:
        """Encode text that follows other text."""
        if not text or not self.has_prefix:
            return self.start(text)
        before, skipped = self._before(text)
        return self.start(before + text)[skipped:]

    def parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode all texts joined, and cut between them; a token across a cut belongs to the text before it."""
        if not self.tokenizer.is_fast:
            return [self.encode(text) for text in texts]
        whole = "".join(texts)
        before, skipped = self._before(whole)
        encoded = self.tokenizer(before + whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"][skipped:], encoded["offset_mapping"][skipped:]
        ends = list(accumulate(map(len, texts), initial=len(before)))[1:]
        found: list[list[int]] = [[] for _ in texts]
        for token, (first, _) in zip(ids, offsets, strict=True):
            found[next((i for i, end in enumerate(ends) if first < end), len(ends) - 1)].append(token)
        return found

    def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode as ``encode`` does, with each token's characters [start, end). Needs a fast tokenizer."""
        before, skipped = self._before(text)
        encoded = self.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = [(max(0, first - len(before)), last - len(before)) for first, last in encoded["offset_mapping"]]
        return list(encoded["input_ids"][skipped:]), offsets[skipped:]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to plain text without changing spaces."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text as ``encode`` does, in one call if possible."""
        if not texts or self.has_prefix:
            return [self.encode(text) for text in texts]
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def behind_character(self, ids: Sequence[int], place: int) -> int:
        """Return ``place``, or the nearest place after it where a character begins or the text ends."""
        while place < len(ids) and not self.begins([ids[place]])[0]:
            place += 1
        return place

    def before_character(self, ids: Sequence[int], place: int) -> int:
        """Return ``place``, or the nearest place before it where a character begins."""
        while 0 < place < len(ids) and not self.begins([ids[place]])[0]:
            place -= 1
        return place

    @cached_property
    def line_end(self) -> int:
        """A token that fills places with no room for a whole character, for example one of three tokens."""
        return (self.encode("\n") or self.encode("."))[-1]  # WordPiece drops line ends

    def begins(self, ids: Sequence[int]) -> list[bool]:
        """Return for each token whether it begins a character; the others continue the bytes of one."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        return [not 0x80 <= self._first_byte(token) < 0xC0 for token in tokens]

    @cached_property
    def opening(self) -> list[int]:
        """Special tokens that the tokenizer puts in front of a text: bos for Gemma and Llama."""
        bare, ids = self.start("a"), list(self.tokenizer("a", verbose=False)["input_ids"])
        return ids[: ids.index(bare[0])] if bare and bare[0] in ids else []

    @cached_property
    def has_prefix(self) -> bool:
        """Whether a word at the beginning of a text has other tokens than after a line end."""
        bare, after = self.start("a"), self.start("\na")
        return after[-len(bare) :] != bare

    def _before(self, text: str) -> tuple[str, int]:
        """Return a string to encode ``text`` after, and its number of tokens."""
        if not self.has_prefix:
            return "", 0
        whole = text[:64]
        for before in BEFORE:
            alone = self.start(before)
            if self.start(before + whole)[: len(alone)] == alone:
                return before, len(alone)
        raise ValueError(
            f"{type(self.tokenizer).__name__} merges {whole[:20]!r} with any text before it, so it cannot be "
            "cut there: use another tokenizer"
        )

    def _first_byte(self, token: str | bytes | None) -> int:
        """Return a token's first byte; 0 for tokens that are not bytes."""
        if isinstance(token, bytes):
            return token[0] if token else 0
        if not token:
            return 0
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return int(token[3:5], 16)
        return self._alphabet.get(token[0], 0) if self._alphabet else 0

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        """Character -> byte in a byte-level vocabulary; empty for other vocabularies."""
        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None or b'"ByteLevel"' not in decoder.__getstate__():  # its settings as JSON
            return {}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
