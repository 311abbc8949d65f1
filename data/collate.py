"""Rows to a batch: one kind at a time, padded on the right."""

from collections.abc import Sequence
from typing import Any

import torch

from data.cases import Case
from data.needles import NeedleCase
from data.packing import Tokens
from sparsekv_pl.batch import IGNORE, Batch, CaseBatch


def text_batch(windows: Sequence[Tokens], context_tokens: int) -> Batch:
    """Windows of plain text: every continuation token is supervised but the first."""
    ids = torch.tensor([window.ids for window in windows], dtype=torch.int64)
    continuation = ids[:, context_tokens:].contiguous()
    labels = continuation.clone()
    labels[:, 0] = IGNORE
    return {
        "context_ids": ids[:, :context_tokens].contiguous(),
        "continuation_ids": continuation,
        "labels": labels,
        "document_ids": [" + ".join(window.document_ids) for window in windows],
        "tasks": ["text"] * len(windows),
    }


def needle_batch(cases: Sequence[NeedleCase], pad: int) -> Batch:
    """Needle cases, continuations padded on the right to the longest."""
    longest = max(len(case.continuation_ids) for case in cases)
    return {
        "context_ids": torch.tensor([case.context_ids for case in cases], dtype=torch.int64),
        "continuation_ids": torch.tensor(
            [_padded(case.continuation_ids, longest, pad) for case in cases], dtype=torch.int64
        ),
        "labels": torch.tensor([_padded(case.labels, longest, IGNORE) for case in cases], dtype=torch.int64),
        "document_ids": [" + ".join(case.document_ids) for case in cases],
        "tasks": [case.task for case in cases],
    }


def case_batch(cases: Sequence[Case], pad: int) -> CaseBatch:
    """Evaluation cases of one task and one context length, continuations padded on the right to the longest."""
    lengths = [len(case.continuation_ids) for case in cases]
    return {
        "context_ids": torch.tensor([case.context_ids for case in cases], dtype=torch.int64),
        "continuation_ids": torch.tensor(
            [_padded(case.continuation_ids, max(lengths), pad) for case in cases], dtype=torch.int64
        ),
        "continuation_lengths": torch.tensor(lengths, dtype=torch.int64),
        "cases": [case.info for case in cases],
    }


def pad_id(tokenizer: Any) -> int:
    """The pad id, else the eos id, else 0: padding is on the right and unlabelled, so any id will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _padded(ids: list[int], length: int, fill: int) -> list[int]:
    return ids + [fill] * (length - len(ids))
