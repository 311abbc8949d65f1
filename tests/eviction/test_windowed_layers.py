"""Eviction in models with windows or linear layers: in full attention alone, the others as the model has them."""

from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    DMSPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    KVzipPress,
    PyramidKVPress,
    SnapKVPress,
    TOVAPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.eviction.answering import Answering
from sparsekv_pl.eviction.cache_layers import tensors_of
from sparsekv_pl.eviction.chunking import chunk_bounds
from sparsekv_pl.eviction.continuation import Continuation
from sparsekv_pl.eviction.decoding import greedy, greedy_together
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.prefill import ChunkedPrefill, continue_from, full_cache, prefill
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.layer_kinds import evicted_layers, others_line
from sparsekv_pl.presses import EvictionAugPress, SparseRegPress
from sparsekv_pl.presses.nesting import press_name
from tests.windowed_models import WINDOW, ids, windowed_model

CONTEXT, CONTINUATION = 40, 8
MIXED = ["gemma3", "qwen2", "llama4", "lfm2", "qwen3-next"]
NOT_TURNED = ("llama4", "qwen3-next")
"""Keys that RoPE does not turn whole, as Llama's."""
ALONE = ["mistral", "phi3"]

mixed = pytest.mark.parametrize("kind", MIXED)
kept_apart = pytest.mark.parametrize("kind", [*MIXED, "falcon-h1"])


def text(rows: int = 2) -> tuple[Tensor, Tensor]:
    return ids(CONTEXT + CONTINUATION, rows).split([CONTEXT, CONTINUATION], dim=1)


@torch.no_grad()
def own(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The hidden states of transformers' own pass, with its own masks."""
    with attention_implementation(model, "sdpa"):
        return model.model(input_ids=tokens).last_hidden_state


def masked(model: PreTrainedModel, press: BasePress, ratio: float, chunk: int | None) -> Tensor:
    """The slow reference: one pass of transformers, whose full layers get an explicit mask of what earlier chunks left.

    The mask that transformers makes for the other layers stays.
    """
    context, continuation = text()
    tokens, bounds = CONTEXT + CONTINUATION, chunk_bounds(CONTEXT, chunk)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(4, 2, 2, 1, 1)
    for (_, stop), (start, end) in zip(bounds, [*bounds[1:], (CONTEXT, tokens)], strict=True):
        press.compression_ratio = ratio
        with torch.no_grad():
            left = prefill(model, context[:, :stop], press, -(-stop // len(chunk_bounds(stop, chunk))), request=KEPT)
        for layer, positions in left.positions.items():
            kept = torch.zeros(2, 2, tokens, dtype=torch.bool).scatter(2, positions, True)
            kept[..., stop:] = True
            visible[layer][:, :, start:end] &= kept[:, :, None]

    def hide(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = torch.zeros(2, 2, tokens, tokens, dtype=model.dtype)
        mask = mask.masked_fill(~visible[module.layer_idx], torch.finfo(model.dtype).min)
        return args, kwargs | {"attention_mask": mask.repeat_interleave(2, dim=1)}

    layers = [model.model.layers[layer].self_attn for layer in evicted_layers(model.config)]
    hooks = [attention.register_forward_pre_hook(hide, with_kwargs=True) for attention in layers]
    with attention_implementation(model, "sdpa"):
        hidden = model.model(input_ids=torch.cat([context, continuation], 1)).last_hidden_state[:, CONTEXT:]
    for hook in hooks:
        hook.remove()
    return hidden


KEPT = Request(contexts=True)


def gradients(model: PreTrainedModel, hidden: Tensor) -> list[Tensor]:
    weights = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros(1) if gradient is None else gradient for gradient in found]


@pytest.mark.parametrize("kind", [*MIXED, *ALONE, "falcon-h1"])
@torch.no_grad()
def test_without_a_press_any_chunks_are_the_model_itself_beyond_its_window(kind: str) -> None:
    model, (context, continuation) = windowed_model(kind), text()
    whole = own(model, torch.cat([context, continuation], 1))[:, CONTEXT:]
    torch.testing.assert_close(full_cache(model, context, continuation), whole, rtol=1e-4, atol=1e-4)
    for chunk in (7, WINDOW, 13):
        prefilled = prefill(model, context, None, chunk)
        steps = continuation.split(1, dim=1)
        hidden = [continue_from(model, one, prefilled.cache, CONTEXT + at) for at, one in enumerate(steps)]
        torch.testing.assert_close(torch.cat(hidden, 1), whole, rtol=1e-4, atol=1e-4)


@kept_apart
@pytest.mark.parametrize("chunk", [None, 15])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_evicted_training_equals_explicit_masks_in_values_and_gradients(
    kind: str, chunk: int | None, checkpoint: bool
) -> None:
    model, press = windowed_model(kind).double(), KeyDiffPress()
    evicted = RealEviction(press, chunk, checkpoint=checkpoint)(model, *text(), compression_ratio=0.5, step=0)
    expected = masked(model, press, 0.5, chunk)
    assert evicted.kept_share == 0.5
    torch.testing.assert_close(evicted.hidden, expected, rtol=1e-4, atol=1e-4)  # some modules compute in float32
    found, references = (torch.cat([one.flatten() for one in gradients(model, h)]) for h in (evicted.hidden, expected))
    single = kind in ("qwen3-next", "falcon-h1")  # their own recurrences are in float32
    assert (found - references).norm() / references.norm() < (1e-3 if single else 1e-5)


@mixed
@torch.no_grad()
def test_only_full_layers_are_evicted_from_and_all_bytes_count(kind: str) -> None:
    model, press = windowed_model(kind), KnormPress(0.5)
    prefilled = prefill(model, text()[0], press)
    lengths = [layer.get_seq_length() for layer in prefilled.cache.layers]
    evicted = evicted_layers(model.config)
    assert [lengths[layer] for layer in evicted] == [CONTEXT // 2] * 2
    held = {"llama4": (CONTEXT - 1) % WINDOW + 1, "lfm2": 0, "qwen3-next": 0}.get(kind, WINDOW - 1)
    assert sorted(lengths) == [held] * 2 + [CONTEXT // 2] * 2
    found = kept_memory(model, prefilled.cache)
    assert found.kept_pairs == CONTEXT // 2
    # Convolutions of 32 channels keep 2 inputs; of 48 channels, 3, beside the states of 2 heads of 8 x 8.
    states = {"lfm2": 2 * 32 * 2, "qwen3-next": 2 * (48 * 3 + 2 * 8 * 8)}.get(kind, 0)
    assert found.kv_bytes == 2 * 4 * (states + sum(lengths) * 2 * 2 * 8)  # keys and values, heads, numbers
    other = {"llama4": "chunks of 12", "lfm2": "no attention but a state (conv)", "qwen3-next": "no attention"}
    line = others_line(model)
    assert "\n" not in line
    assert f"in the 2 of 4 layers with full attention; 2 have {other.get(kind, 'a window of 12')}" in line


@kept_apart
@torch.no_grad()
def test_a_shared_prefill_is_each_press_s_own(kind: str) -> None:
    model, (context, continuation) = windowed_model(kind), text()
    recorded = RecordedPrefill(model, context)
    presses: list[BasePress] = [KeyDiffPress(0.5), AdaKVPress(KnormPress(0.5)), KnormPress(0.9)]
    if kind not in NOT_TURNED:
        presses.append(KeyRerotationPress(KeyDiffPress(0.5)))
    if kind in ("gemma3", "qwen2"):
        presses.append(SnapKVPress(0.7, window_size=4))
    for press in [*presses, None, *presses]:
        check_press(model, press)
        shared = recorded.evicted(press)
        hidden = continue_from(model, continuation, shared.cache, shared.next_position)
        alone = prefill(model, context, press)
        assert shared.next_position == alone.next_position
        expected = continue_from(model, continuation, alone.cache, alone.next_position)
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


@kept_apart
@torch.no_grad()
def test_an_interrupted_prefill_goes_on_where_it_was(kind: str) -> None:
    model, (context, continuation) = windowed_model(kind), text()
    press = KeyDiffPress(0.5) if kind in NOT_TURNED else KeyRerotationPress(KeyDiffPress(0.5))
    check_press(model, press)
    whole, first, second = (ChunkedPrefill(model, press, CONTEXT, 9) for _ in range(3))
    whole.run(context)
    for start, stop in first.bounds[:2]:
        first.advance(context[:, start:stop])
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for start, stop in second.bounds[2:]:
        second.advance(context[:, start:stop])
    for one, other in zip(whole.cache.layers, second.cache.layers, strict=True):
        there, here = tensors_of(one), tensors_of(other)
        assert there and all(torch.equal(there[name], here[name]) for name in there)
    results = whole.result(), second.result()
    hidden = [continue_from(model, continuation, one.cache, one.next_position) for one in results]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("chunk", [None, 9])
@torch.no_grad()
def test_a_window_moves_along_with_keys_that_are_re_rotated(chunk: int | None) -> None:
    """In the first layer, which has a window, keys depend on tokens and positions alone."""
    model, (context, _) = windowed_model("gemma3"), text()
    prefilled, reference = prefill(model, context, KeyRerotationPress(KeyDiffPress(0.5)), chunk), DynamicCache()
    assert prefilled.next_position == CONTEXT // 2
    continue_from(model, context[:, 1 - WINDOW :], reference, prefilled.next_position + 1 - WINDOW)
    keys, values = ((one.layers[0].keys, one.layers[0].values) for one in (prefilled.cache, reference))
    torch.testing.assert_close(keys, values, rtol=0, atol=2e-5)


@kept_apart
@torch.no_grad()
def test_batches_of_questions_are_answered_as_each_alone(kind: str) -> None:
    model, context = windowed_model(kind), text(1)[0].expand(3, -1)
    press, lengths = KeyDiffPress(0.5), [2, WINDOW + 5, 7]
    questions = [ids(length, seed=length)[0] for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(questions, batch_first=True)
    most = [20, 3, WINDOW + 6]
    together = greedy(model, prefill(model, context, press), padded, torch.tensor(lengths), most)
    for row, question in enumerate(questions):
        assert together[row] == _slow_answer(model, context[:1], press, question, most[row])
    asked = [
        Answering(model, prefill(model, context, one), padded, torch.tensor(lengths), most) for one in (press, None)
    ]
    greedy_together(model, asked)
    assert asked[0].answers == together


def _slow_answer(model: PreTrainedModel, context: Tensor, press: BasePress, question: Tensor, most: int) -> list[int]:
    """One row, one token at a time."""
    prefilled, answer, read = prefill(model, context, press), list[int](), question.tolist()
    for step in range(len(read) + most - 1):
        token = read[step] if step < len(read) else answer[-1]
        hidden = continue_from(model, torch.tensor([[token]]), prefilled.cache, CONTEXT + step, decoding=True)
        if step >= len(read) - 1:
            answer.append(int(model.get_output_embeddings()(hidden)[0, -1].argmax()))
    return answer


@mixed
@torch.no_grad()
def test_decoding_evicts_in_full_layers_alone(kind: str) -> None:
    model, (context, continuation) = windowed_model(kind), ids(CONTEXT + 30, 2).split([CONTEXT, 30], dim=1)
    filling = ChunkedPrefill(model, KnormPress(), CONTEXT, request=Request(contexts=True))
    filling.run(context)
    going = Continuation(filling, Decoding(4, budget=64, context=False), 0.0, 30)
    hidden = going.read(continuation)
    whole = own(model, torch.cat([context, continuation], 1))[:, CONTEXT:]
    torch.testing.assert_close(hidden[:, :23], whole[:, :23], rtol=1e-3, atol=1e-3)  # nothing was over the budget yet
    lengths = [layer.get_seq_length() for layer in going.reading.cache.layers]
    assert all(64 <= lengths[layer] <= 68 for layer in evicted_layers(model.config))
    assert min(lengths) < WINDOW


@pytest.mark.parametrize("kind", ALONE)
def test_a_model_of_windows_alone_is_evicted_from_within_its_window_and_refused_beyond(kind: str) -> None:
    model, press = windowed_model(kind), KeyDiffPress()
    tokens = ids(WINDOW + 4, 2)
    evict = RealEviction(press)
    within = evict(model, tokens[:, :8], tokens[:, 8:WINDOW], compression_ratio=0.5, step=0)
    assert within.kept_share == 0.5 and others_line(model) == ""
    for context, continuation in ((tokens[:, :8], tokens[:, 8:]), (tokens[:, :WINDOW], tokens[:, WINDOW:])):
        with pytest.raises(ValueError, match=f"window of {WINDOW} through which every layer") as refused:
            evict(model, context, continuation, compression_ratio=0.5, step=0)
        assert "\n" not in str(refused.value)
    press.compression_ratio = 0.5
    with pytest.raises(ValueError, match=f"window of {WINDOW} through which every layer"):
        RecordedPrefill(model, tokens[:, :WINDOW]).evicted(press)
    with pytest.raises(ValueError, match=f"window of {WINDOW} through which every layer"):
        greedy(model, prefill(model, tokens[:, :8], press), tokens[:, 8:10], torch.tensor([2, 2]), [5, 3])


@pytest.mark.parametrize("press", [PyramidKVPress(0.5), KVzipPress(0.5), DMSPress(KnormPress(), 0.1)], ids=press_name)
def test_presses_that_need_every_layer_are_refused_by_name(press: BasePress) -> None:
    check_press(windowed_model("mistral"), press)
    with pytest.raises(ValueError, match=rf"{press_name(press).partition('(')[0]}.* needs every layer .* layers 0, 2"):
        check_press(windowed_model("gemma3"), press)


def test_a_drawn_press_evicts_where_those_inside_do() -> None:
    for press in (EvictionAugPress([KeyDiffPress(), SnapKVPress(window_size=4)]), SparseRegPress(KeyDiffPress())):
        check_press(windowed_model("gemma3"), press)
    with pytest.raises(ValueError, match="KVzip needs every layer"):
        check_press(windowed_model("gemma3"), EvictionAugPress([KeyDiffPress(), KVzipPress()]))


@pytest.mark.parametrize("kind", ["gemma3", "qwen2"])
@pytest.mark.parametrize("press", [SnapKVPress(window_size=4), ExpectedAttentionPress(), TOVAPress()], ids=press_name)
def test_scores_by_queries_are_computed_from_full_layers_own_rope(kind: str, press: Any) -> None:
    """kvpress's ExpectedAttention fails on Gemma 3 by itself; here it selects in chunks and trains."""
    model = windowed_model(kind)
    check_press(model, press)
    request = Request(scores=True)
    evicted = RealEviction(press, 14)(model, *text(), compression_ratio=0.5, step=0, request=request)
    assert {selection.layer for selection in evicted.selections} == set(evicted_layers(model.config))
    assert all(selection.scores.requires_grad for selection in evicted.selections)
