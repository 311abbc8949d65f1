"""The last queries' attention against the attention of real models: every architecture, padding, parts, gradients."""

from typing import Any

import pytest
import torch
from kvpress import ChunkPress, DecodingPress, ScorerPress
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.presses.window_attention import window_attention, window_rows
from tests.random_models import KINDS, random_model

LENGTH, WINDOW = 20, 6
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ROTATED_BY_HALF = "phi3, half of it rotated"


def model_of(kind: str, dtype: torch.dtype = torch.float32, implementation: str = "eager") -> PreTrainedModel:
    settings = {"rope_parameters": HALF} if kind == ROTATED_BY_HALF else {}
    model = random_model(kind.split(",")[0], initializer_range=0.3, attn_implementation=implementation, **settings)
    return model.to(dtype).eval()


def ids(rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


class Calls(list[tuple[nn.Module, Tensor, dict[str, Any]]]):
    """The inputs of a press's hook in every layer: the module, the keys, the keywords."""

    def __init__(self, model: PreTrainedModel, mask: Tensor | None = None, length: int = LENGTH) -> None:
        cache = DynamicCache()
        hooks = [
            layer.self_attn.register_forward_hook(
                lambda module, _, kwargs, __: self.append((module, cache.layers[module.layer_idx].keys, kwargs)),
                with_kwargs=True,
            )
            for layer in model.model.layers
        ]
        eager = model.config._attn_implementation == "eager"
        output = model.model(ids(length=length), attention_mask=mask, past_key_values=cache, output_attentions=eager)
        self.attentions = output.attentions
        for hook in hooks:
            hook.remove()

    def window(self, layer: int, window: int = WINDOW) -> Tensor:
        module, keys, kwargs = self[layer]
        return window_attention(module, kwargs["hidden_states"], keys, kwargs, window)


def padded(left: tuple[int, ...] = (0, 5, 16), right: tuple[int, ...] = (0, 0, 0)) -> Tensor:
    mask = torch.ones(len(left), LENGTH, dtype=torch.long)
    for row, (before, after) in enumerate(zip(left, right, strict=True)):
        mask[row, :before] = 0
        mask[row, LENGTH - after :] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, ROTATED_BY_HALF])
@pytest.mark.parametrize("window", [1, WINDOW, LENGTH, 2 * LENGTH])
def test_it_is_the_models_own_attention(kind: str, window: int) -> None:
    calls = Calls(model_of(kind))
    for layer in range(2):
        found = calls.window(layer, window)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, calls.attentions[layer][:, :, -window:], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_padding_receives_nothing_and_the_window_ends_with_the_row(kind: str, side: str, implementation: str) -> None:
    left = (0, 5, 16) if side != "right" else (0, 0, 0)
    right = {"left": (0, 0, 0), "right": (3, 0, 17), "both": (4, 2, 1)}[side]
    mask = padded(left, right)
    expected = Calls(model_of(kind), mask).attentions
    calls = Calls(model_of(kind, implementation=implementation), mask)
    for layer in range(2):
        found = calls.window(layer)
        counts = []
        for row in range(3):
            first, end = left[row], LENGTH - right[row]
            count = min(WINDOW, end - first)
            torch.testing.assert_close(
                found[row, :, WINDOW - count :], expected[layer][row, :, end - count : end], atol=1e-6, rtol=1e-5
            )
            assert not found[row, :, : WINDOW - count].any()
            assert not found[row, :, :, ~mask[row].bool()].any()
            counts.append(count)
        assert window_rows(found)[:, 0, 0].tolist() == counts
        assert min(counts) < WINDOW or side == "both"


@torch.no_grad()
def test_a_row_of_nothing_but_padding_is_0_and_not_nan() -> None:
    found = Calls(model_of("llama"), padded((0, 5, LENGTH))).window(0)
    assert not found[2].any()
    assert window_rows(found)[2].tolist() == [[1.0]] * 4


def test_gradients_are_those_of_eager_attention() -> None:
    """Of both layers, so that they also pass through hidden states. Eager attention takes its softmax in float32."""
    model = model_of("qwen3", torch.float64)
    pick = torch.randn(3, 4, WINDOW, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for own in (True, False):
        model.zero_grad()
        calls = Calls(model, padded((0, 0, 0), (0, 5, 2)))  # on the right: eager rows that see nothing are NaN
        if own:
            found = [calls.window(layer) for layer in range(2)]
        else:
            rows = torch.tensor([[14], [9], [12]]) + torch.arange(WINDOW)
            index = rows[:, None, :, None].expand(-1, 4, -1, LENGTH)
            found = [attention.gather(2, index) for attention in calls.attentions]
        assert found[0].dtype == torch.float64
        torch.stack([(attention * pick).sum() for attention in found]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any("k_proj" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-5)


def test_gradients_are_finite_where_rows_have_fewer_tokens_than_the_window() -> None:
    model = model_of("llama")
    Calls(model, padded((0, 16, 18), (0, 1, 0))).window(0).square().sum().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all() and gradient.any()


@torch.no_grad()
def test_bfloat16_is_computed_in_float32() -> None:
    found = Calls(model_of("llama", torch.bfloat16)).window(0)
    exact = Calls(model_of("llama")).window(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0.1)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 4, WINDOW))


@torch.no_grad()
def test_a_chunk_looks_at_the_cache_before_it_too() -> None:
    """Chunked prefill: more keys than hidden states."""
    model = model_of("llama")
    expected = Calls(model).attentions[1][:, :, -WINDOW:]
    cache, found = DynamicCache(), []

    def look(module: nn.Module, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        keys = cache.layers[1].keys
        assert keys is not None
        found.append(window_attention(module, kwargs["hidden_states"], keys, kwargs, WINDOW))

    model.model.layers[1].self_attn.register_forward_hook(look, with_kwargs=True)
    continue_from(model, ids()[:, :12], cache, 0)
    continue_from(model, ids()[:, 12:], cache, 12)
    torch.testing.assert_close(found[1], expected, atol=1e-6, rtol=1e-5)


class Looking(ScorerPress):
    """Score by position and record the results of ``window_attention``."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:  # noqa: ARG002
        self.seen = [*getattr(self, "seen", []), window_attention(module, hidden_states, keys, kwargs, 3)]
        return torch.arange(keys.shape[2]).expand(keys.shape[:3]).float()


def renormalised(attention: Tensor) -> Tensor:
    return attention / attention.sum(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("left", [(0, 0, 0), (0, 2, 3)])
def test_parts_that_chunk_press_shows_have_their_own_positions_and_padding(left: tuple[int, ...]) -> None:
    model = model_of("llama", implementation="sdpa")
    mask = padded(left)
    press = Looking(0.5)
    with ChunkPress(press, chunk_length=8)(model):
        model.model(ids(), attention_mask=mask, past_key_values=DynamicCache())
    expected = Calls(model_of("llama"), mask).attentions
    assert len(press.seen) == 6
    for layer, chunk in ((0, 0), (0, 1), (0, 2), (1, 1)):
        start, stop = chunk * 8, min(chunk * 8 + 8, LENGTH)
        part = renormalised(expected[layer][:, :, stop - 3 : stop, start:stop])
        torch.testing.assert_close(press.seen[3 * layer + chunk], part, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_that_decoding_press_collects_have_their_own_positions() -> None:
    model = model_of("llama", implementation="sdpa")
    press, cache = Looking(), DynamicCache()
    with DecodingPress(press, compression_interval=8, target_size=10)(model):
        continue_from(model, ids()[:, :12], cache, 0)
        for position in range(12, LENGTH):
            continue_from(model, ids()[:, position : position + 1], cache, position, decoding=True)
    expected = Calls(model_of("llama")).attentions
    for layer in range(2):
        assert cache.get_seq_length(layer) == 10
        torch.testing.assert_close(press.seen[layer], expected[layer][:, :, -3:], atol=1e-5, rtol=1e-4)
