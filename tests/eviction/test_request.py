"""An eviction answers what is requested, call by call, and keeps nothing of the request."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from kvpress import SnapKVPress
from transformers import PreTrainedModel

from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import NOTHING, Request


def test_requests_add_up() -> None:
    layers = Request(layers=frozenset({"hidden"})) | Request(layers=frozenset({"attention"}))
    assert layers == Request(layers=frozenset({"hidden", "attention"}))
    names = ("teacher", "scores", "contexts", "press_losses")
    for name in names:
        for both in (Request(**{name: True}) | NOTHING, NOTHING | Request(**{name: True})):
            assert [getattr(both, other) for other in names] == [other == name for other in names]
    with pytest.raises(FrozenInstanceError):
        layers.scores = True  # type: ignore[misc]


@pytest.mark.parametrize("chunk_tokens", [None, 12])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_eviction_answers_one_request_after_the_other(
    random_model: Callable[..., PreTrainedModel], chunk_tokens: int | None, checkpoint: bool
) -> None:
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    eviction = RealEviction(SnapKVPress(window_size=4), chunk_tokens, checkpoint=checkpoint)
    settings, model, hidden = dict(vars(eviction)), random_model(), []
    for request in (Request(scores=True), Request(contexts=True), NOTHING, Request(teacher=True)):
        evicted = eviction(model, ids[:, :24], ids[:, 24:], compression_ratio=0.5, step=0, request=request)
        assert bool(evicted.selections) is request.scores
        assert (evicted.context is not None) is request.contexts
        assert vars(eviction) == settings
        hidden.append(evicted.hidden)
    for other in hidden[1:]:  # a request changes only the order of the keys
        torch.testing.assert_close(other, hidden[0])
