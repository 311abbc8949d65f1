"""An eviction answers what is requested and keeps nothing of it; the last layer's MLP computes what is used alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from kvpress import SnapKVPress
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import continue_from, prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.eviction.skipped_mlp import last_mlp_for
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.training.teacher import Teacher


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


IDS = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
CONTEXT, CONTINUATION = IDS[:, :32], IDS[:, 32:]


@pytest.fixture(scope="module")
def adapted(tiny_backbone: Callable[..., Any]) -> Any:
    return tiny_backbone().load()[0]


@contextmanager
def rows_of_mlps(model: PreTrainedModel) -> Iterator[list[int]]:
    """Record the number of tokens that each MLP's gate gets, in order."""
    rows: list[int] = []
    gates = [layer.mlp.gate_proj for layer in decoder_of(model).layers]
    hooks = [gate.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1])) for gate in gates]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_a_prefill_leaves_the_last_mlp_out_and_the_same_cache(adapted: Any) -> None:
    model, press = causal_lm(adapted), SnapKVPress(0.5, window_size=8)
    with rows_of_mlps(model) as rows:
        cache = prefill(model, CONTEXT, press).cache
    assert rows == [32]
    whole = DynamicCache()
    with press(model):
        continue_from(model, CONTEXT, whole, 0)
    for mine, reference in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(mine.keys, reference.keys)
        torch.testing.assert_close(mine.values, reference.values)


def test_a_teacher_computes_it_for_the_continuation(adapted: Any) -> None:
    model = causal_lm(adapted)
    with rows_of_mlps(model) as rows:
        hidden = Teacher(adapted)(CONTEXT, CONTINUATION)
    assert rows == [40, 8]
    with torch.no_grad(), adapted.disable_adapter():
        reference = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state[:, 32:]
    torch.testing.assert_close(hidden, reference, rtol=1e-4, atol=1e-5)


def test_shorter_forwards_and_what_comes_after_are_whole(adapted: Any) -> None:
    mlp = decoder_of(causal_lm(adapted)).layers[-1].mlp
    with torch.no_grad(), last_mlp_for(causal_lm(adapted), 8):
        hidden = torch.randn(2, 5, 64)
        torch.testing.assert_close(mlp(hidden), type(mlp).forward(mlp, hidden))
    assert "forward" not in vars(mlp)
