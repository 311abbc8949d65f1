"""A student that differs from its teacher, and a batch of text for both."""

from typing import Any

import torch
from kvpress import BasePress, KnormPress

from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher

CONTEXT, CONTINUATION, RATIO = 30, 8, 0.5


def batch() -> Batch:
    ids = torch.randint(0, 64, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    context, continuation = ids[:, :CONTEXT], ids[:, CONTEXT:]
    return Batch(
        context_ids=context,
        continuation_ids=continuation,
        labels=continuation,
        document_ids=["a", "b"],
        tasks=["text", "text"],
    )


def student(model: Any, objective: Any, press: BasePress | None = None, **settings: Any) -> Student:
    """``settings`` are those of ``RealEviction``; the teacher is ``model`` as it was given."""
    teacher = Teacher(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return Student(model, RealEviction(press or KnormPress(), **settings), teacher, objective)
