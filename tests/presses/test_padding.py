"""Padding keys are found from the attention masks that presses get."""

import pytest
import torch
from kvpress import (
    ChunkPress,
    ComposedPress,
)
from torch import Tensor

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.presses.key_tokens import real_keys
from tests.presses.tokens_cases import CHUNK, CONTEXT, Blind, context, pressed
from tests.random_models import Build

PADDED = torch.ones(2, CONTEXT, dtype=torch.long)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("hidden", [slice(0, 5), slice(-5, None)], ids=["left", "right"])
def test_padding_is_read_off_the_mask(random_model: Build, implementation: str, hidden: slice) -> None:
    model, press, mask = random_model(), Blind(0.5), PADDED.clone()
    model.set_attn_implementation(implementation)
    mask[1, hidden] = 0
    pressed(model, press, attention_mask=mask)
    for call in press.calls:
        assert call.real is not None
        assert torch.equal(call.real, mask.bool())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, PADDED])
def test_no_padding_is_none(random_model: Build, implementation: str, mask: Tensor | None) -> None:
    model, press = random_model(), Blind(0.5)
    model.set_attn_implementation(implementation)
    pressed(model, press, attention_mask=mask)
    assert [call.real for call in press.calls] == [None, None]
    with torch.no_grad():
        prefill(model, context(), press, CHUNK)
    assert [call.real for call in press.calls] == [None] * 10


def test_a_mask_of_two_dimensions_is_taken_as_it_is() -> None:
    """Masks as for flash attention."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    real = real_keys(torch.zeros(2, 1, 3, 4), {"attention_mask": mask})
    assert real is not None
    assert real.tolist() == [[False, True, True], [True, True, True]]


def test_padding_is_unknown_once_another_press_has_evicted(random_model: Build) -> None:
    mask = PADDED.clone()
    mask[1, :5] = 0
    with pytest.raises(ValueError, match="put this press first"):
        pressed(random_model(), ComposedPress([Blind(0.5), Blind(0.5)]), attention_mask=mask)


def test_each_part_of_the_keys_has_its_own_padding(random_model: Build) -> None:
    inner, mask = Blind(0.5), PADDED.clone()
    mask[1, :5], mask[0, -3:] = 0, 0
    pressed(random_model(), ChunkPress(inner, chunk_length=20), attention_mask=mask)
    masks = [call.real for call in inner.calls]
    for layer in (masks[:3], masks[3:]):
        assert torch.equal(torch.cat(layer, dim=1), mask.bool())
