"""Dropping spans with padding, inside kvpress's wrappers, chunk by chunk, in bfloat16; gradients; settings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import BasePress, DecodingPress, KeyRerotationPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.span_dropout import Shown, SpanDropoutPress
from tests.presses.span_cases import CONTEXT, RATIO, Build, blocks, both, context, evicted


def order_of_keys(model: PreTrainedModel, press: BasePress, ids: Tensor, **stock: Any) -> Tensor:
    """Return the keys in the order in which they are dropped, (layers, B, K, S)."""
    with catch_scores(press) as caught:
        evicted(model, press, ids, **stock)
    for scored in caught:
        assert scored.scores.dtype == torch.float32 and scored.scores.isfinite().all()
        assert all(len(set(row.tolist())) == row.numel() for row in scored.scores.flatten(0, 1))
    return torch.stack([scored.scores.argsort(-1) for scored in caught])


@torch.no_grad()
def test_every_decoded_token_draws_anew(random_model: Build) -> None:
    model = random_model().train()
    press = blocks(0.0, protect_recent=0, block_size=2)
    cache, found = DynamicCache(), []
    with DecodingPress(press, compression_interval=4, target_size=20)(model), catch_scores(press) as caught:
        for position, token in enumerate(context()[:, :40].split(1, dim=1)):
            model.model(input_ids=token, past_key_values=cache, cache_position=torch.tensor([position]), use_cache=True)
            if position % 4 == 0 and position > 20:  # the first token is a prefill
                found.append(cache.layers[0].keys.shape[2])
    assert found and set(found) == {20}
    drawn = [scored.scores[0, 0].tolist() for scored in caught if scored.scores.shape[-1] == 24]
    assert len(drawn) > 4 and len(set(map(tuple, drawn))) == len(drawn)


def test_gradients_equal_those_of_a_dense_pass_that_hides_what_went(random_model: Build) -> None:
    model, press, more = random_model().train(), blocks(shared=True), context(5, tokens=8)
    positions = prefill(model, context(), press, request=Request(contexts=True)).positions[0][:, 0]
    keeping = torch.zeros(2, CONTEXT, dtype=torch.bool).scatter(1, positions, True)
    evicting = RealEviction(press)

    def gradients(hidden: Tensor) -> list[Tensor]:
        weight = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
        loss = (hidden * weight).sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.model.parameters()))]

    hidden = evicting(model, context(), more, compression_ratio=RATIO, step=0).hidden
    visible = torch.ones(CONTEXT + 8, CONTEXT + 8).tril().bool().repeat(2, 1, 1)
    visible[:, CONTEXT:, :CONTEXT] &= keeping[:, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    dense = model.model(torch.cat([context(), more], 1), attention_mask=mask, use_cache=False).last_hidden_state
    for found, expected in zip(gradients(hidden), gradients(dense[:, CONTEXT:]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@both
def test_bfloat16_draws_the_same(random_model: Build, build: Callable[..., Any]) -> None:
    half = order_of_keys(random_model().bfloat16(), build(), context())
    assert torch.equal(half, order_of_keys(random_model(), build(), context()))


@both
@pytest.mark.parametrize("rotated", [False, True])
def test_every_chunk_of_a_prefill_draws_anew(
    random_model: Build, build: Callable[..., Any], rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press, firsts = random_model().train(), build(), []
    known = SpanDropoutPress.uniform

    def uniform(self: SpanDropoutPress, shown: Shown, *args: Any) -> Tensor:
        firsts.append((shown.layer, *shown.firsts))
        return known(self, shown, *args)

    monkeypatch.setattr(SpanDropoutPress, "uniform", uniform)
    outer = KeyRerotationPress(press) if rotated else press
    ids = context(tokens=120)
    evicting = RealEviction(outer, chunk_tokens=20, budget=20)
    result = evicting(model, ids, context(5, tokens=8), compression_ratio=RATIO, step=1)
    assert result.kept_share == 20 / 120
    # The first chunk fits; from the second on, chunks begin at true positions, though keys are turned to 0..39.
    expected = {(layer, start, start) for layer in range(2) for start in range(0, 120, 20)}
    assert set(firsts) == expected
    result.hidden.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.parameters() if p.grad is not None)


def test_defaults_are_those_of_the_seed() -> None:
    press = BlockDropoutPress()
    assert (press.block_size, press.protect_start, press.protect_recent) == (64, 4, 64)
