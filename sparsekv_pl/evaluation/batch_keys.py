"""What of a batch decides its records: the part of a key of finished work that is the data's."""

import hashlib
from typing import Any

from torch import Tensor

from sparsekv_pl.models.batch import CaseBatch

ASKED = ("task", "answers", "question", "answer_prefix", "max_new_tokens")
"""What decides how a case is measured and scored, and stands in its record."""
NAMED = (*ASKED, "id", "depth", "seed", "document_ids", "answer_span")
"""Everything that is known of a case; its context is its tokens."""


def batch_of(batch: CaseBatch, named: bool) -> dict[str, Any]:
    """What decides a batch's records: tokens, and what is known of its cases.

    ``named`` for records in which a case's name and place stand too; without, what is asked and how it is scored.
    """
    ids = (batch["context_ids"], batch["continuation_ids"], batch["continuation_lengths"])
    cases = [[getattr(case, name) for name in (NAMED if named else ASKED)] for case in batch["cases"]]
    return {"tokens": [[list(part.shape), _digest(part)] for part in ids], "cases": cases}


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.cpu().contiguous().numpy().data, digest_size=16).hexdigest()
