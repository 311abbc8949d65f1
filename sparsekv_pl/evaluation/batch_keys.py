"""The data's part of a key of finished work: tokens and cases of a batch."""

import hashlib
from dataclasses import asdict
from typing import Any

from torch import Tensor

from sparsekv_pl.models.batch import CaseBatch

ASKED = ("task", "answers", "question", "answer_prefix", "max_new_tokens")
"""Fields of a case that decide how it is measured and scored; its record holds them."""
NAMED = (*ASKED, "id", "depth", "seed", "document_ids", "answer_span", "needle_span")
"""All fields of a case but its context, which is keyed by its tokens."""


def batch_of(batch: CaseBatch, named: bool) -> dict[str, Any]:
    """The parts of a batch that decide its records, JSON-able: digests of its tokens, and fields of its cases.

    Parameters
    ----------
    batch
        Contexts (B, L) and continuations (B, T) with their cases.
    named
        Include each case's name and place (``NAMED``), for records that hold them; otherwise only the question and how
        its answer is scored (``ASKED``).
    """
    ids = (batch["context_ids"], batch["continuation_ids"], batch["continuation_lengths"])
    cases = [[getattr(case, name) for name in (NAMED if named else ASKED)] for case in batch["cases"]]
    turns = [case.turns and asdict(case.turns) for case in batch["cases"]]
    described: dict[str, Any] = {"turns": turns} if any(turns) else {}  # the work done on others keeps its keys
    return described | {"tokens": [[list(part.shape), _digest(part)] for part in ids], "cases": cases}


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.cpu().contiguous().numpy().data, digest_size=16).hexdigest()
