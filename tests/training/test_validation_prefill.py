"""Validation's results with full and evicted cache come from one prefill, and equal those of two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KeyRerotationPress, SnapKVPress

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.prefill import full_cache
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.objectives import LM
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher
from sparsekv_pl.training.validation_prefill import full_and_evicted


def snap() -> SnapKVPress:
    return SnapKVPress(window_size=8)


def either() -> BasePress:
    return EvictionAugPress([ExpectedAttentionPress(), snap()], score_all=True)


SHARED: dict[str, Eviction] = {
    "press": RealEviction(snap()),
    "drawn": RealEviction(either()),
    "long": RealEviction(snap(), chunk_tokens=32),
}
APART: dict[str, Eviction] = {
    "chunks": RealEviction(snap(), chunk_tokens=16),
    "budget": RealEviction(snap(), budget=12),
    "wrapper": RealEviction(KeyRerotationPress(snap())),
}


@pytest.fixture(scope="module")
def model(tiny_backbone: Callable[..., Any]) -> Any:
    return tiny_backbone().load()[0].eval()


@pytest.mark.parametrize("name", [*SHARED, *APART])
@pytest.mark.parametrize("place", [0, 3])
def test_both_sides_are_those_of_two_prefills(model: Any, name: str, place: int) -> None:
    eviction = {**SHARED, **APART}[name]
    ids = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = Batch(context_ids=ids[:, :32], continuation_ids=ids[:, 32:], labels=ids[:, 32:])  # type: ignore[typeddict-item]
    student = Student(model, eviction, Teacher(model), LM())
    read: list[int] = []
    hook = (
        decoder_of(causal_lm(model))
        .layers[0]
        .mlp.register_forward_hook(lambda _m, args, _o: read.append(args[0].shape[1]))
    )
    full, evicted, selections = full_and_evicted(student, batch, 0.5, place)
    hook.remove()
    assert selections == []
    with torch.no_grad():
        torch.testing.assert_close(full, full_cache(causal_lm(model), ids[:, :32], ids[:, 32:]))
        torch.testing.assert_close(evicted, student.evict(batch, 0.5, place).hidden, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(full, evicted)
    if name in SHARED:
        assert read == [32, 8, 8]
    else:
        assert sum(read) > 48
