"""Collate rows of one kind to a batch, padded on the right."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from data.cases import Case, TrainingCase
from data.packing import Tokens
from sparsekv_pl.models.batch import IGNORE, Batch, CaseBatch, Supervised

T = TypeVar("T")


class MadeOnAccess(Dataset[T], Generic[T]):
    """Items that are made when they are read."""

    def __init__(self, makers: Sequence[Callable[[], T]]) -> None:
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, index: int) -> T:
        return self.makers[index]()


def text_batch(windows: Sequence[Tokens], continuation_tokens: int, pad: int) -> Batch:
    """Collate windows of plain text that end in a continuation, supervised except for its first token."""
    continuation = torch.tensor([window.ids[-continuation_tokens:] for window in windows], dtype=torch.int64)
    labels = continuation.clone()
    labels[:, 0] = IGNORE
    batch: Batch = {
        "context_ids": _ids([window.ids[:-continuation_tokens] for window in windows], pad),
        "continuation_ids": continuation,
        "labels": labels,
        "document_ids": [" + ".join(window.document_ids) for window in windows],
        "tasks": ["text"] * len(windows),
    }
    return _with_lengths(batch, [len(window.ids) - continuation_tokens for window in windows])


def needle_batch(cases: Sequence[TrainingCase], pad: int) -> Batch:
    """Collate cases with questions; contexts and continuations are padded on the right to the longest."""
    batch: Batch = {
        "context_ids": _ids([case.context_ids for case in cases], pad),
        "continuation_ids": _ids([case.continuation_ids for case in cases], pad),
        "labels": _ids([case.labels for case in cases], IGNORE),
        "document_ids": [" + ".join(case.document_ids) for case in cases],
        "tasks": [case.task for case in cases],
    }
    continuations = [len(case.continuation_ids) for case in cases]
    if min(continuations) < max(continuations):
        batch["continuation_lengths"] = continuations
    if any(case.turn_ends for case in cases):
        batch["turn_ends"] = [case.turn_ends for case in cases]
    return _with_lengths(batch, [len(case.context_ids) for case in cases])


def case_batch(cases: Sequence[Case], pad: int) -> CaseBatch:
    """Collate evaluation cases of one task and one context length; continuations are padded on the right."""
    lengths = [len(case.continuation_ids) for case in cases]
    return {
        "context_ids": torch.tensor([case.context_ids for case in cases], dtype=torch.int64),
        "continuation_ids": _ids([case.continuation_ids for case in cases], pad),
        "continuation_lengths": torch.tensor(lengths, dtype=torch.int64),
        "cases": [case.info for case in cases],
    }


def pad_id(tokenizer: Any) -> int:
    """Return the pad id, else the eos id, else 0: padding is on the right and unlabelled, so any id works."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _ids(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """Pad rows on the right with ``fill`` to (B, longest) int64."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64)


def _with_lengths(batch: Batch, lengths: list[int]) -> Batch:
    """Add the supervised positions to ``batch``, and the contexts' lengths if they differ."""
    batch["supervised"] = Supervised.of(batch["labels"])
    if min(lengths) < max(lengths):
        batch["context_lengths"] = lengths
    return batch
