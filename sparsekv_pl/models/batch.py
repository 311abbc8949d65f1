"""The batches that data makes and modules consume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, Self, TypedDict

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that no loss and no metric looks at."""


class Supervised(NamedTuple):
    """Where a continuation (B, T) predicts supervised tokens: position t - 1 predicts label t.

    How many they are is known on the host: a GPU that had to say so would be waited for.
    """

    columns: Tensor
    """(B, R) int64. In row b the first ``counts[b]`` are those positions, ascending; others fill it up."""
    counts: list[int]

    @classmethod
    def of(cls, labels: Tensor) -> Self:
        """Look through labels (B, T), once and where they are made."""
        predicts = labels[:, 1:] != IGNORE
        counts = predicts.sum(1).tolist()
        order = predicts.int().argsort(dim=1, descending=True, stable=True)
        return cls(order[:, : max(1, *counts)], counts)

    def of_rows(self, rows: Sequence[int]) -> "Supervised":
        """The same for some of the rows."""
        counts = [self.counts[row] for row in rows]
        return Supervised(_rows(self.columns, rows)[:, : max(1, *counts)], counts)

    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns (N,) of all these positions: ``hidden[places]`` is (N, E) of hidden states (B, T, E)."""
        columns = [own[:count] for own, count in zip(self.columns, self.counts, strict=True)]
        rows = [torch.full_like(own, row) for row, own in enumerate(columns)]
        return torch.cat(rows), torch.cat(columns)


class Batch(TypedDict):
    """Context + continuation windows; the eviction happens between the two.

    ``labels`` equals ``continuation_ids`` where a token is supervised and ``IGNORE`` elsewhere; it is not shifted.
    Column 0 is never supervised: the last context token predicts it, and that token saw the full cache.
    """

    context_ids: Tensor
    """(B, L) int64, padded on the right where ``context_lengths`` says so."""
    context_lengths: NotRequired[list[int]]
    """Tokens of each row's context; every row has L where it is missing. Rows of different lengths never run together:
    padding would be scored and kept like text."""
    continuation_ids: Tensor
    """(B, T) int64, padded on the right, where a causal model cannot see the padding."""
    continuation_lengths: NotRequired[list[int]]
    """Tokens of each row's continuation; every row has T where it is missing."""
    labels: Tensor
    """(B, T) int64."""
    supervised: NotRequired[Supervised]
    """Where ``labels`` are supervised, found where they were made; looked for in them where it is missing."""
    document_ids: list[str]
    """The documents that row b was made of, for error messages and for proving that splits are disjoint."""
    tasks: list[str]
    """"text", or the name of the retrieval task that made row b."""
    skipped_documents: NotRequired[int]
    """Documents that whoever made the batch could not use so far."""


def rows_of_equal_length(batch: Batch) -> Iterator[Batch]:
    """The batch in parts of equally long, unpadded contexts, so that each row gets what it would get alone.

    Shorter parts come first, rows within a part in the batch's order. What a press draws at random it draws for a row's
    tokens, whatever part they come in.
    """
    lengths = context_lengths(batch)
    if set(lengths) == {batch["context_ids"].shape[1]}:
        yield batch
        return
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        yield Batch(
            context_ids=_rows(batch["context_ids"], rows)[:, :length],
            continuation_ids=_rows(batch["continuation_ids"], rows),
            labels=_rows(batch["labels"], rows),
            supervised=supervised_in(batch).of_rows(rows),
            document_ids=[batch["document_ids"][row] for row in rows],
            tasks=[batch["tasks"][row] for row in rows],
        )


def supervised_in(batch: Batch) -> Supervised:
    """What the batch says of itself, or its labels do."""
    return batch["supervised"] if "supervised" in batch else Supervised.of(batch["labels"])


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; a list as an index would be copied to the device, which waits for it."""
    return torch.stack([values[row] for row in rows])


def context_lengths(batch: Batch) -> list[int]:
    """Tokens of each row's context, padding aside."""
    rows, longest = batch["context_ids"].shape
    lengths = batch.get("context_lengths", [longest] * rows)
    assert len(lengths) == rows and 1 <= min(lengths) <= max(lengths) <= longest, (lengths, rows, longest)
    return lengths


def tokens_read(batch: Batch) -> int:
    """Tokens that a model computes: padding after a context is cut off, padding after a continuation is read too."""
    return sum(context_lengths(batch)) + batch["continuation_ids"].numel()


def tokens_given(batch: Batch) -> int:
    """Tokens of text in a batch, without any padding."""
    rows, longest = batch["continuation_ids"].shape
    return sum(context_lengths(batch)) + sum(batch.get("continuation_lengths", [longest] * rows))


TEXT = "text"
"""The task whose continuation is read, not answered."""


@dataclass
class CaseInfo:
    """What is known of one case of an evaluation besides its tokens. Lightning cannot move a frozen dataclass."""

    id: str
    """Unique in an evaluation and the same in every run of it."""
    task: str
    """``TEXT``, or the retrieval task's name."""
    answers: tuple[str, ...] = ()
    """What the model should say; empty for ``TEXT``."""
    context: str = ""
    """The context as plain text, without the chat template's marks."""
    question: str = ""
    """The question as plain text; in a query-aware case the context ends with it already."""
    answer_prefix: str = ""
    """How the answer is begun for the model."""
    max_new_tokens: int = 0
    depth: float | None = None
    """Fraction of the haystack before the (first) needle; None where a task has no such place."""
    seed: int = 0
    document_ids: tuple[str, ...] = ()
    answer_span: tuple[int, int] | None = None
    """Tokens [start, end) of the context that hold the answer; None where that is not known."""


class CaseBatch(TypedDict):
    """Cases of one task and one context length."""

    context_ids: Tensor
    """(B, L) int64, unpadded."""
    continuation_ids: Tensor
    """(B, T) int64, padded on the right: the text that follows, or the question up to where the answer begins."""
    continuation_lengths: Tensor
    """(B,) int64, tokens of each continuation."""
    cases: list[CaseInfo]
