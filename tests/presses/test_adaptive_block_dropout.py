"""Blocks with little attention from the last queries are dropped first, and sink attention protects no block."""

import math
from typing import Any

import pytest
import torch
from kvpress import BasePress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.presses import adaptive_block_dropout
from sparsekv_pl.presses.adaptive_block_dropout import AdaptiveBlockDropoutPress, sink_attention
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.span_dropout import Shown
from tests.random_models import Build

CONTEXT, BLOCK, WINDOW, BLOCKS = 60, 7, 5, 9


def adaptive(ratio: float = 0.5, **settings: Any) -> AdaptiveBlockDropoutPress:
    defaults = {"block_size": BLOCK, "window_size": WINDOW, "protect_start": 3, "protect_recent": 6, "sink_tokens": 3}
    return AdaptiveBlockDropoutPress(ratio, **defaults | settings)


def context(seed: int = 0, rows: int = 2, tokens: int = CONTEXT) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def evicted(model: PreTrainedModel, press: BasePress, ids: Tensor, **stock: Any) -> list[Tensor]:
    """Return every layer's scores, in training, with stock attention."""
    cache = DynamicCache()
    with press(model.train()), catch_scores(press) as caught:
        model.model(input_ids=ids, past_key_values=cache, **stock)
    assert all(scored.scores.isfinite().all() for scored in caught)
    return [scored.scores for scored in caught]


def importances(model: PreTrainedModel, press: AdaptiveBlockDropoutPress, ids: Tensor, **stock: Any) -> list[Tensor]:
    found: list[Tensor] = []
    known = press.importance
    press.importance = lambda *args: (found.append(known(*args)), found[-1])[1]  # type: ignore[method-assign]
    evicted(model, press, ids, **stock)
    vars(press).pop("importance")
    return found


def expected_importance(attention: Tensor, sinks: int) -> Tensor:
    """Compute importance (B, K, N) in plain loops, from attention matrices (B, H, S, S) of 4 query and 2 KV heads."""
    rows = attention[:, :, -WINDOW:]
    result = torch.zeros(len(rows), 2, BLOCKS)
    for b in range(len(rows)):
        for head in range(2):
            for n in range(BLOCKS):
                places = range(n * BLOCK, min((n + 1) * BLOCK, CONTEXT))
                density = sink = 0.0
                for place in places:
                    received = rows[b, 2 * head : 2 * head + 2, :, place].mean().item()
                    steady = rows[b, :, :, place].flatten().sort().values[4 * WINDOW // 2 - 1].item()
                    density += received / len(places)
                    sink += (received if place < sinks else min(received, steady)) / len(places)
                result[b, head, n] = density * (1 - sink / density)
    return result


@pytest.mark.parametrize("sinks", [0, 3])
def test_importance_is_that_of_whole_attention_matrices(random_model: Build, sinks: int) -> None:
    found = importances(random_model(), adaptive(sink_tokens=sinks), context())
    eager = random_model(attn_implementation="eager")
    with torch.no_grad():
        attentions = eager.model(context(), output_attentions=True).attentions
    for layer, attention in zip(found, attentions, strict=True):
        torch.testing.assert_close(layer, expected_importance(attention, sinks), rtol=1e-4, atol=1e-7)


def test_what_most_heads_pay_at_most_queries_is_sink_attention() -> None:
    attention = torch.full((2, 4, 5, 4), 0.01)
    attention[0, :3, :, 1] = 0.5  # by three heads of four
    attention[0, :2, :, 2] = 0.5  # by two
    attention[0, :, :3, 3] = 0.5  # at three queries of five
    expected = torch.tensor([[0.01, 0.5, 0.01, 0.5], [0.01] * 4])
    torch.testing.assert_close(sink_attention(attention), expected)


def order_of_blocks(scores: Tensor) -> Tensor:
    """Return the blocks without protected keys in the order in which they are dropped, (B, K, 7)."""
    whole = scores[..., BLOCK : 8 * BLOCK].unflatten(-1, (7, BLOCK)).amin(-1)
    return whole[..., :6].argsort(-1) + 1


def test_temperature_0_drops_the_least_important_whatever_is_drawn(random_model: Build) -> None:
    model, press = random_model(), adaptive(temperature=0.0)
    worth = importances(model, press, context())
    for step in (0, 1):
        press.draw(step)
        for scores, blocks in zip(evicted(model, press, context()), worth, strict=True):
            assert torch.equal(order_of_blocks(scores), blocks[..., 1:7].argsort(-1) + 1)


def test_temperature_1_keeps_in_proportion_to_importance() -> None:
    """The block kept longest is drawn with odds proportional to its importance; at infinity all have the same."""

    class Module(torch.nn.Module):
        layer_idx = 0

    draws = 2000
    place = torch.arange(4).expand(draws, -1)
    shares = {1.0: [0.1, 0.2, 0.3, 0.4], 0.5: [1 / 30, 4 / 30, 9 / 30, 16 / 30], math.inf: [0.25] * 4}
    for temperature, odds in shares.items():
        press = _Given(0.5, temperature=temperature)
        press.given = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(draws, 1, -1)
        longest = _priority(press, Module(), place).argmax(-1)
        torch.testing.assert_close(longest.flatten().bincount() / draws, torch.tensor(odds), rtol=0, atol=0.045)


class _Given(AdaptiveBlockDropoutPress):
    """A press whose importance is set by a test."""

    given: Tensor

    def importance(self, *_: Any) -> Tensor:
        return self.given


def _priority(press: AdaptiveBlockDropoutPress, module: Any, place: Tensor) -> Tensor:
    kwargs = {"position_ids": place, "position_embeddings": (torch.zeros(1, 4, 2),) * 2}
    shown = Shown(module, torch.zeros(len(place), 4, 2), torch.zeros(len(place), 1, 4, 2), kwargs, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive_block_dropout, "window_attention", lambda *_: torch.zeros(1, 1, 1, 4))
        return press.priority(shown, place[:, None])


def test_nothing_flows_through_the_choice_and_gradients_through_what_stays(random_model: Build) -> None:
    model, press = random_model().train(), adaptive()
    with press(model), catch_scores(press) as caught:
        model.model(context(), past_key_values=DynamicCache())
    assert len(caught) == 2 and not any(scored.scores.requires_grad for scored in caught)
    evicting = RealEviction(press, chunk_tokens=30, budget=20)
    hidden = evicting(model, context(), context(5, tokens=8), compression_ratio=0.5, step=0).hidden
    hidden.square().sum().backward()
    grads = {name: p.grad for name, p in model.model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert grads["layers.0.self_attn.k_proj.weight"].abs().sum() > 0


def test_rows_that_are_no_queries_do_not_count_as_sinks() -> None:
    attention = torch.rand(1, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 2, 5, 8), attention], dim=2)
    assert torch.equal(sink_attention(padded), sink_attention(attention))


def test_in_float64_too(random_model: Build) -> None:
    press = AdaptiveBlockDropoutPress(0.5, window_size=8, protect_recent=8)
    ids = torch.randint(0, 64, (1, 48), generator=torch.Generator().manual_seed(0))
    assert prefill(random_model().double().train(), ids, press).cache.get_seq_length() == 24
