"""Pack documents into token windows: shuffled, endless, exactly resumable."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from data.facts import Split
from data.text import Document, DocumentBlocks, Splits, TextSource
from sparsekv_pl.models.encoding import Encoder
from sparsekv_pl.models.seeding import random_for

JOINT = "\n\n"
"""Separator after every document."""


@dataclass
class Tokens:
    """Token ids with the documents they come from; ``spans`` is (document id, number of tokens) in order."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[str, int]] = field(default_factory=list)

    @property
    def document_ids(self) -> list[str]:
        """The documents' ids, in order, each once."""
        return list(dict.fromkeys(name for name, _ in self.spans))

    def append(self, document_id: str, ids: list[int]) -> None:
        """Append a document's tokens."""
        self.ids += ids
        self.spans.append((document_id, len(ids)))

    def first(self, enough: int) -> "Tokens":
        """Return the first documents that together have ``enough`` tokens (the last is not cut), or all."""
        end = 0
        for _, count in self.spans:
            if end >= enough:
                break
            end += count
        return self.slice(0, end)

    def slice(self, start: int, end: int) -> "Tokens":
        """Return the tokens [start, end) with their documents."""
        spans, offset = [], 0
        for name, count in self.spans:
            inside = min(end, offset + count) - max(start, offset)
            if inside > 0:
                spans.append((name, inside))
            offset += count
        return Tokens(self.ids[start:end], spans)


def encode_document(encoder: Encoder, document: Document) -> list[int]:
    """Encode a document that follows another, with ``JOINT`` after it and without special tokens."""
    return encoder.encode(document.text + JOINT)


def take_tokens(documents: Iterable[Document], tokenizer: Any, enough: int) -> Tokens:
    """Join documents in order until there are ``enough`` tokens (the last is not cut) or no more documents."""
    taken, encoder = Tokens(), Encoder(tokenizer)
    for document in documents:
        taken.append(document.id, encode_document(encoder, document))
        if len(taken.ids) >= enough:
            break
    return taken


def enough_for(span: int) -> int:
    """Return the number of text tokens from which evaluation takes stretches of ``span`` tokens.

    A function of the span alone, so that a case does not depend on the other cases of an evaluation.
    """
    return min(64 * span, span + 2**20)


def split_tokens(source: TextSource, splits: Splits, split: Split, tokenizer: Any, span: int) -> Tokens:
    """Return the text of a split from its beginning, ``enough_for(span)`` tokens or all that it has.

    Of several mixed sources, each has its share, cut in its last document. Raises ``ValueError`` if no document belongs
    to the split.
    """
    enough, text = enough_for(span), Tokens()
    for part, share in source.parts():
        documents = (document for document in part.documents() if splits.of(document.text) == split)
        own = take_tokens(documents, tokenizer, ceil(share * enough))
        own = own if share == 1 else own.slice(0, ceil(share * enough))
        text = Tokens(text.ids + own.ids, text.spans + own.spans)
    if not text.ids:
        raise ValueError(
            f"the {split} split of the text has no document: give more documents or raise its share ({splits})"
        )
    return text


def spread_windows(text: Tokens, count: int, window: int, fresh: int, encoder: Encoder) -> list[Tokens]:
    """Return ``count`` windows of ``text``: see ``window_starts`` and ``window_at``."""
    starts = window_starts(text, count, window, fresh, encoder)
    return [window_at(text, start, window, fresh, encoder) for start in starts]


def window_at(text: Tokens, start: int, window: int, fresh: int, encoder: Encoder) -> Tokens:
    """Return ``window`` tokens of ``text``, of which the last ``fresh`` are the continuation.

    The first token is a bos if the tokenizer begins texts with one. The continuation begins with a whole character: if
    the context would end inside one, line ends at the window's beginning shift the text.
    """
    first, end = encoder.opening, start + window - fresh
    begin = encoder.behind_character(text.ids, start + len(first))
    spare = end - encoder.before_character(text.ids, end)
    piece = text.slice(begin, start + window - spare)
    return Tokens([*first, *[encoder.line_end] * (window - len(first) - len(piece.ids)), *piece.ids], piece.spans)


def window_starts(text: Tokens, count: int, window: int, fresh: int, encoder: Encoder) -> list[int]:
    """Choose the starts of ``count`` windows of ``window`` tokens, spread evenly.

    Windows begin with whole characters. Contexts may overlap if the text is short, but the last ``fresh`` tokens, which
    are predicted, do not, except for the tokens of a character on the border. Raises ``ValueError`` if there is no room
    for ``count`` windows.
    """
    if count == 0:
        return []
    last, first = len(text.ids) - window, len(encoder.opening)
    step = last // max(count - 1, 1)
    if last < 0 or (count > 1 and step < fresh):
        room = 0 if last < 0 else last // fresh + 1
        raise ValueError(
            f"{count} windows of {window} tokens requested of a split with {len(text.ids)} tokens, which has room for "
            f"{room}: ask for fewer windows, raise the split's share or give more text"
        )
    return [max(0, encoder.before_character(text.ids, i * step + first) - first) for i in range(count)]


class DocumentStream(Iterator[Document]):
    """The documents of one split and one worker, endless, each once per epoch, in an order drawn from the seed.

    Documents are shuffled within blocks (all of them if the source is in memory), so that the state is small and exact:
    the reader's state at the block's start, and the position in the block.
    """

    def __init__(
        self, source: TextSource, splits: Splits, split: Split, seed: int = 0, number: int = 0, total: int = 1
    ) -> None:
        self.share = f"{split} share {number} of {total}"
        self.seed = seed
        self.blocks: DocumentBlocks = source.blocks(lambda text: splits.of(text) == split, number, total)
        self.epoch, self.block, self.position = 0, 0, 0
        self.found = False
        self.start = self.blocks.state_dict()
        self.order: list[Document] = []
        self.documents = ""
        """Fingerprint of the present block's documents."""

    def __next__(self) -> Document:
        while self.position >= len(self.order):
            self._read_block()
        self.position += 1
        self.found = True
        return self.order[self.position - 1]

    def _read_block(self) -> None:
        start = self.blocks.state_dict()
        documents = self.blocks.next()  # if this fails, the state is still that of the previous block
        self.start, self.block, self.position = start, self.block + 1, 0
        if documents is None:
            if not self.found:
                raise ValueError(
                    f"the {self.share} of the text has no document: give more documents or use fewer workers"
                )
            self.epoch, self.block, self.found = self.epoch + 1, 0, False
        self.order = list(documents or ())
        self.documents = _fingerprint(self.order)
        random_for("order", self.seed, self.epoch, self.block).shuffle(self.order)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next document."""
        return {
            "share": self.share,
            "epoch": self.epoch,
            "block": self.block,
            "position": self.position,
            "found": self.found,
            "start": self.start,
            "documents": self.documents,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; ``ValueError`` if it is another share's, or the documents have changed."""
        if state["share"] != self.share:
            raise ValueError(
                f"the state is of the {state['share']}, this stream reads the {self.share}: resume with as "
                "many ranks and workers"
            )
        self.blocks.load_state_dict(state["start"])
        self.epoch, self.block, self.found = state["epoch"], state["block"] - 1, state["found"]
        self.order = []
        if state["block"] > 0:
            self._read_block()
        else:
            self.block = 0
        self.position = state["position"]
        if self.documents != state["documents"]:
            raise ValueError(
                f"the {self.share} of the text has other documents than the checkpoint read (epoch {self.epoch}, block "
                f"{self.block}: fingerprint {self.documents}, was {state['documents']}): resume with the text as it "
                "was, or start a new run"
            )


def _fingerprint(documents: list[Document]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for document in documents:
        digest.update(f"{document.id}\0{len(document.text)}\0{document.text}\0".encode(errors="surrogatepass"))
    return digest.hexdigest() if documents else ""


class WindowStream(Iterator[Tokens]):
    """Windows of exactly ``window`` tokens from a document stream; leftover tokens begin the next window.

    The rest of a character that was cut at a window's end is left out. Of a document with more than ``most`` windows,
    ``most`` are taken from a place that is drawn anew in every epoch; None takes all.
    """

    def __init__(self, documents: DocumentStream, tokenizer: Any, window: int, most: int | None = None) -> None:
        self.documents, self.encoder, self.window, self.most = documents, Encoder(tokenizer), window, most
        self.rest = Tokens()

    @property
    def skipped(self) -> int:
        """Number of unusable documents so far."""
        return self.documents.blocks.skipped

    def __next__(self) -> Tokens:
        while len(self.rest.ids) < self.window:
            document = next(self.documents)
            self.rest.append(document.id, self._stretch(document))
        window = self.rest.slice(0, self.window)
        next_one = self.encoder.behind_character(self.rest.ids, self.window)
        self.rest = self.rest.slice(next_one, len(self.rest.ids))
        return window

    def _stretch(self, document: Document) -> list[int]:
        ids, documents = encode_document(self.encoder, document), self.documents
        if self.most is None or len(ids) <= self.most * self.window:
            return ids
        rng = random_for("stretch", documents.seed, documents.epoch, document.id)
        start = self.encoder.behind_character(ids, rng.randrange(len(ids) - self.most * self.window + 1))
        end = self.encoder.before_character(ids, min(len(ids), start + self.most * self.window))
        return ids[start:end]

    def state_dict(self) -> dict[str, Any]:
        """Return the document stream's state and the leftover tokens."""
        return {"documents": self.documents.state_dict(), "ids": list(self.rest.ids), "spans": list(self.rest.spans)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.documents.load_state_dict(state["documents"])
        self.rest = Tokens(list(state["ids"]), [(name, count) for name, count in state["spans"]])
