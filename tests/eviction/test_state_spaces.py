"""State spaces are continued as their recurrence says, and stay whole where presses evict beside them."""

import pytest
import torch
from kvpress import KnormPress, KVzipPress
from torch import Tensor

from sparsekv_pl.attention.handed_on import DROP
from sparsekv_pl.eviction.cache_layers import tensors_of
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.press_model_check import check_press
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.state_space import scan
from sparsekv_pl.models.cache_shape import cache_shape
from sparsekv_pl.models.layer_kinds import others_line
from tests.architectures import architecture
from tests.windowed_models import ids, windowed_model

CONTEXT = 40


def step_by_step(inputs: Tensor, decays: Tensor, write: Tensor, read: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, token by token."""
    outputs = []
    for token in range(inputs.shape[1]):
        state = state * decays[:, token, :, None, None].exp() + inputs[:, token, ..., None] * write[:, token, :, None]
        outputs.append((state * read[:, token, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_scan_is_its_recurrence_in_values_and_gradients(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 11, 3, 5), (2, 11, 3), (2, 11, 3, 4), (2, 11, 3, 4), (2, 3, 5, 4)
    inputs, decays, write, read, state = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    )
    leaves = inputs, decays, write, read, state
    found = scan(inputs, -decays.exp(), write, read, state, chunk)
    expected = step_by_step(inputs, -decays.exp(), write, read, state)
    gradients = []
    for outputs, last in (found, expected):
        gradients.append(torch.autograd.grad((outputs.sin().sum() + last.cos().sum()), leaves))
    for mine, other in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        torch.testing.assert_close(mine, other)
    zeros = scan(inputs, -decays.exp(), write, read, None, chunk)
    torch.testing.assert_close(zeros, step_by_step(inputs, -decays.exp(), write, read, torch.zeros_like(state)))


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_a_gated_norm_sees_single_tokens_of_several_rows(before: bool) -> None:
    """transformers' own norm of Falcon-H1 mixes the rows up in a forward of one token."""
    model = architecture("falcon_h1", mamba_rms_norm=True, mamba_norm_before_gate=before)
    text = ids(CONTEXT, 3)
    hidden = prefill(model, text, None, chunk_tokens=CONTEXT - 1)
    assert hidden.next_position == CONTEXT
    keys = [tensors_of(layer)["keys"] for layer in hidden.cache.layers]
    reference = [tensors_of(layer)["keys"] for layer in prefill(model, text, None).cache.layers]
    for mine, other in zip(keys, reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_decoder_that_hands_no_keywords_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekv_pl.attention.handed_on.DROP", ())
    assert "FalconH1Model" in DROP
    with pytest.raises(ValueError, match="FalconH1Model hands no keywords on"):
        prefill(architecture("falcon_h1"), ids(CONTEXT), KnormPress(0.5))


@torch.no_grad()
def test_a_state_space_beside_an_attention_stays_whole_and_its_bytes_count() -> None:
    model, press = windowed_model("falcon-h1"), KnormPress(0.5)
    evicted, full = (prefill(model, ids(CONTEXT, 2), one).cache for one in (press, None))
    for one, other in zip(evicted.layers, full.layers, strict=True):
        assert one.get_seq_length() == CONTEXT // 2 == other.get_seq_length() // 2
        there, here = tensors_of(one), tensors_of(other)
        assert set(there) == {"keys", "values", "convolved", "recurrent"} == set(here)
    assert torch.equal(tensors_of(evicted.layers[0])["recurrent"], tensors_of(full.layers[0])["recurrent"])
    shape = cache_shape(model.config)
    for cache, kept in ((evicted, CONTEXT // 2), (full, CONTEXT)):
        pairs = shape.pairs(CONTEXT, kept) * shape.pair_bytes * 4
        assert kept_memory(model, cache).kv_bytes == 2 * (pairs + shape.state_bytes(4))
        packed = kept_memory(model, cache, PairQuantisation(4)).kv_bytes - 2 * shape.state_bytes(4)
        assert 0 < packed < pairs
    line = others_line(model)
    assert "\n" not in line and "4 of 4 layers have a state space beside their attention" in line
    with pytest.raises(ValueError, match=r"KVzip runs the model by itself, .* has states .* layers 0, 1, 2, 3"):
        check_press(model, KVzipPress(0.5))
