"""The batches that data modules make and training and evaluation consume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, Self, TypedDict

import torch
from torch import Tensor

IGNORE = -100
"""Label of tokens that losses and metrics ignore."""


class Supervised(NamedTuple):
    """The positions of a continuation (B, T) that predict supervised tokens: position t - 1 predicts label t.

    Their numbers are kept on the host, so that reading them does not synchronise with a GPU.
    """

    columns: Tensor
    """(B, R) int64. In row b the first ``counts[b]`` are those positions, ascending; the rest is filler."""
    counts: list[int]
    """Number of supervised positions in each row."""

    @classmethod
    def of(cls, labels: Tensor) -> Self:
        """Find the positions in labels (B, T)."""
        predicts = labels[:, 1:] != IGNORE
        counts = predicts.sum(1).tolist()
        order = predicts.int().argsort(dim=1, descending=True, stable=True)
        return cls(order[:, : max(1, *counts)], counts)

    def of_rows(self, rows: Sequence[int]) -> "Supervised":
        """Return the positions of some of the rows."""
        counts = [self.counts[row] for row in rows]
        return Supervised(_rows(self.columns, rows)[:, : max(1, *counts)], counts)

    def places(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns (N,) of all positions: ``hidden[places]`` is (N, E) of hidden states (B, T, E)."""
        columns = [own[:count] for own, count in zip(self.columns, self.counts, strict=True)]
        rows = [torch.full_like(own, row) for row, own in enumerate(columns)]
        return torch.cat(rows), torch.cat(columns)


class Batch(TypedDict):
    """Contexts and continuations; the eviction happens between the two.

    ``labels`` equals ``continuation_ids`` for supervised tokens and is ``IGNORE`` elsewhere; it is not shifted.
    Column 0 is never supervised: the last context token predicts it, and that token saw the full cache.
    """

    context_ids: Tensor
    """(B, L) int64, padded on the right according to ``context_lengths``."""
    context_lengths: NotRequired[list[int]]
    """Tokens of each row's context; if missing, every row has L. Rows of different lengths never run together:
    padding would be scored and kept like text."""
    continuation_ids: Tensor
    """(B, T) int64, padded on the right, where a causal model cannot see the padding."""
    continuation_lengths: NotRequired[list[int]]
    """Tokens of each row's continuation; if missing, every row has T."""
    turn_ends: NotRequired[Sequence[Sequence[int]]]
    """Tokens of each row's continuation after which a turn of its conversation ends, rising; if missing, none does."""
    labels: Tensor
    """(B, T) int64."""
    supervised: NotRequired[Supervised]
    """The supervised positions of ``labels``; found in them if missing."""
    document_ids: list[str]
    """The documents of each row, for error messages and for checking that splits are disjoint."""
    tasks: list[str]
    """Per row, "text" or the name of the retrieval task that made it."""
    skipped_documents: NotRequired[int]
    """Number of documents that the batch's worker could not use so far."""
    left_out_questions: NotRequired[dict[str, int]]
    """Per kind of question, how often the worker drew it so far for a text that has nothing for it."""


def rows_of_equal_length(batch: Batch) -> Iterator[Batch]:
    """Split the batch into parts of equally long, unpadded contexts, so that each row computes what it would alone.

    The rows of a part also have equal ``turn_ends``. Shorter parts come first, rows within a part in the batch's order.
    A press's random draws depend on a row's tokens, not on its part.
    """
    ends = [tuple(own) for own in batch.get("turn_ends", [()] * len(batch["labels"]))]
    kinds = list(zip(context_lengths(batch), ends, strict=True))
    if set(kinds) == {(batch["context_ids"].shape[1], ends[0])}:
        yield batch
        return
    for length, turns in sorted(set(kinds)):
        rows = [row for row, own in enumerate(kinds) if own == (length, turns)]
        part = Batch(
            context_ids=_rows(batch["context_ids"], rows)[:, :length],
            continuation_ids=_rows(batch["continuation_ids"], rows),
            labels=_rows(batch["labels"], rows),
            supervised=supervised_in(batch).of_rows(rows),
            document_ids=[batch["document_ids"][row] for row in rows],
            tasks=[batch["tasks"][row] for row in rows],
        )
        if turns:
            part["turn_ends"] = [turns] * len(rows)
        yield part


def supervised_in(batch: Batch) -> Supervised:
    """Return the batch's supervised positions, found in its labels if it has none."""
    return batch["supervised"] if "supervised" in batch else Supervised.of(batch["labels"])


def turn_ends(part: Batch) -> tuple[int, ...]:
    """Return the ``turn_ends`` that all rows of a part of ``rows_of_equal_length`` have."""
    return tuple(part.get("turn_ends", [()])[0])


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Select rows; indexing with a list would synchronise with the device."""
    return torch.stack([values[row] for row in rows])


def context_lengths(batch: Batch) -> list[int]:
    """Return the number of tokens of each row's context, without padding."""
    rows, longest = batch["context_ids"].shape
    lengths = batch.get("context_lengths", [longest] * rows)
    assert len(lengths) == rows and 1 <= min(lengths) <= max(lengths) <= longest, (lengths, rows, longest)
    return lengths


def tokens_read(batch: Batch) -> int:
    """Return the number of tokens that a model computes: without contexts' padding, with continuations' padding."""
    return sum(context_lengths(batch)) + batch["continuation_ids"].numel()


def tokens_given(batch: Batch) -> int:
    """Return the number of tokens in a batch, without any padding."""
    rows, longest = batch["continuation_ids"].shape
    return sum(context_lengths(batch)) + sum(batch.get("continuation_lengths", [longest] * rows))


TEXT = "text"
"""The name of the task of plain text, whose continuation is read, not answered."""


@dataclass
class CaseTurns:
    """The turns of a case that is a conversation, whose first turn is the context. Not frozen: see ``CaseInfo``."""

    ends: tuple[int, ...]
    """Tokens of the continuation after which a turn ends. The turn that asks ends with the answer, so it has no end."""
    since: int
    """Turns between the one that told the answer, or corrected it, and the question: 1 is the turn before."""
    outdated: str = ""
    """The value before the correction, which is wrong; empty if there was none."""

    @property
    def asked_in(self) -> int:
        """The turn that asks, counted from 1."""
        return len(self.ends) + 2


@dataclass
class CaseInfo:
    """The description of one evaluation case, besides its tokens. Not frozen: Lightning moves it to devices."""

    id: str
    """Unique in an evaluation and the same in every run of it."""
    task: str
    """``TEXT``, or the retrieval task's name."""
    answers: tuple[str, ...] = ()
    """The expected answers; empty for ``TEXT``."""
    context: str = ""
    """The context as plain text, without the chat template's marks."""
    question: str = ""
    """The question as plain text; in a query-aware case the context already ends with it."""
    answer_prefix: str = ""
    """The beginning of the answer, given to the model."""
    max_new_tokens: int = 0
    """Most tokens of the generated answer."""
    depth: float | None = None
    """Fraction of the haystack before the (first) needle; None if the task has no needle."""
    seed: int = 0
    """Seed of the case."""
    document_ids: tuple[str, ...] = ()
    """The documents of the context."""
    answer_span: tuple[int, int] | None = None
    """Tokens [start, end) of the context that contain the answer; None if unknown."""
    needle_span: tuple[int, int] | None = None
    """Tokens [start, end) of the inserted statement that the answer stands in; None if unknown."""
    turns: CaseTurns | None = None
    """The turns of a conversation; None for a single question or text."""


class CaseBatch(TypedDict):
    """Cases of one task and one context length."""

    context_ids: Tensor
    """(B, L) int64, unpadded."""
    continuation_ids: Tensor
    """(B, T) int64, padded on the right: the text that follows, or the question up to the answer's beginning."""
    continuation_lengths: Tensor
    """(B,) int64, tokens of each continuation."""
    cases: list[CaseInfo]
    """The description of each row."""
