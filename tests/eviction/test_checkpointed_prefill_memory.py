"""Activation checkpointing by chunks: one chunk's activations are alive at a time, however many chunks there are."""

from typing import NamedTuple
from weakref import finalize

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KeyRerotationPress, KnormPress
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.presses.nesting import press_name
from tests.random_models import Build


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            finalize(storage, self._free, address, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


class Bytes(NamedTuple):
    live: int
    """At most, forward and backward together."""
    kept: int
    """By autograd, outside the checkpointed chunks."""


def step_bytes(model: PreTrainedModel, chunks: int, checkpoint: bool, press: BasePress) -> Bytes:
    chunk, budget, kept = 64, 8, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    context = torch.randint(0, 64, (2, chunk * chunks), generator=torch.Generator().manual_seed(0))
    eviction = RealEviction(press, chunk, budget, checkpoint)
    with LiveBytes() as counted:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            asked = Request(scores=True)
            evicted = eviction(model, context, context[:, :8], compression_ratio=0.0, step=0, request=asked)
        loss = evicted.hidden.square().sum() + sum(s.scores.square().sum() for s in evicted.selections)
        held = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        loss.backward()
    return Bytes(counted.peak, sum(size for address, size in kept.items() if address not in held))


@pytest.mark.parametrize("press", [KnormPress(), KeyRerotationPress(ExpectedAttentionPress())], ids=press_name)
def test_only_one_chunks_activations_are_alive(random_model: Build, press: BasePress) -> None:
    model = random_model(hidden_size=64, intermediate_size=256, head_dim=16)
    (two, eight), (two_kept, eight_kept) = (
        [step_bytes(model, chunks, checkpoint, press) for chunks in (2, 8)] for checkpoint in (True, False)
    )
    activations = (eight_kept.live - two_kept.live) / 6  # of one chunk: what each chunk more costs without
    state = (eight.kept - two.kept) / 6
    assert 0 < state < 0.15 * activations
    assert eight.live - two.live < 6 * 0.2 * activations
    assert two.live < 2 * activations
    assert eight_kept.live > 3 * eight.live
