"""Quantised pairs: equal to rounding one number at a time, as small as they say, and rows do not touch each other."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.eviction.quantised_pairs import PackedPairs, PairQuantisation, quantise, quantised_bytes
from tests.eviction.slow_rounding import slowly_rounded

SETTINGS = [
    PairQuantisation(8),
    PairQuantisation(4, group=32),
    PairQuantisation(4, group=5, residual=3),
    PairQuantisation(2, group=64, residual=40),
]


def pairs(count: int = 21, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values (2, 3, count, 8); a channel of large keys, and one whose numbers are all equal."""
    keys, values = torch.randn(2, 2, 3, count, 8, generator=torch.Generator().manual_seed(0)).unbind()
    keys[..., 1] += 30
    keys[..., 2] = 0.3
    return keys.to(dtype), values.to(dtype)


def cache_of(*layers: tuple[Tensor, Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_equal_rounding_one_number_at_a_time(settings: PairQuantisation, dtype: torch.dtype) -> None:
    given = pairs(dtype=dtype)
    expected = slowly_rounded(*given, settings.bits, settings.group, settings.residual)
    got = PackedPairs.of(*given, settings).unpacked()
    for numbers, wanted in zip(got, expected, strict=True):
        assert numbers.dtype == dtype
        # a number half-way between two codes may go either way
        tolerance = 1e-5 if dtype == torch.float32 else 0.008
        torch.testing.assert_close(numbers, wanted, rtol=tolerance, atol=tolerance)
    whole = max(0, 21 - settings.residual)
    assert torch.equal(got[0][:, :, whole:], given[0][:, :, whole:])


@pytest.mark.parametrize("bits, worst", [(8, 0.5 / 255), (4, 0.5 / 15), (2, 0.5 / 3)])
def test_no_number_is_further_than_half_a_step_from_its_own(bits: int, worst: float) -> None:
    keys, values = pairs(64)
    rounded_keys, rounded_values = PackedPairs.of(keys, values, PairQuantisation(bits)).unpacked()
    for numbers, rounded, along in ((keys, rounded_keys, 2), (values, rounded_values, 3)):
        spread = numbers.amax(along, keepdim=True) - numbers.amin(along, keepdim=True)
        half_float = numbers.abs().amax() * 2**-10  # of the group's scale and minimum
        assert ((rounded - numbers).abs() <= worst * spread + half_float).all()
    assert (rounded_keys[..., 2] - 0.3).abs().max() < 1e-3  # a group of equal numbers has no step


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 21, 64])
def test_bytes_are_those_of_codes_scales_minima_and_whole_pairs(settings: PairQuantisation, count: int) -> None:
    keys, values = pairs(count, torch.bfloat16)
    cache = cache_of((keys, values), (values, keys))
    layers = quantise(cache, settings).values()
    stored = [
        tensor
        for layer in layers
        for part in (layer.keys, layer.values)
        for tensor in (part.codes, part.steps, part.least)
    ]
    newest = [tensor for layer in layers for tensor in (layer.newest_keys, layer.newest_values)]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in [*stored, *newest])
    assert quantised_bytes(cache, settings) == expected == sum(layer.nbytes for layer in layers)


def test_four_bits_of_64_channels_are_36_bytes_and_not_128() -> None:
    keys = torch.randn(1, 1, 64, 64, dtype=torch.bfloat16)
    assert quantised_bytes(cache_of((keys, keys)), PairQuantisation(4)) == 64 * 2 * (32 + 4)


def test_a_row_is_rounded_as_it_is_alone() -> None:
    keys, values = pairs()
    together = PackedPairs.of(keys, values, PairQuantisation(4, group=8)).unpacked()
    alone = PackedPairs.of(keys[1:], values[1:], PairQuantisation(4, group=8)).unpacked()
    for both, one in zip(together, alone, strict=True):
        assert torch.equal(both[1:], one)


def test_gradients_pass_through_the_rounding_and_values_are_exact() -> None:
    keys, values = (part.requires_grad_() for part in pairs())
    cache = cache_of((keys * 1, values * 1))
    packed = quantise(cache, PairQuantisation(2))[0]
    weights = torch.randn(keys.shape)
    layer = cache.layers[0]
    assert layer.keys is not None and layer.values is not None
    for read, stored in zip((layer.keys, layer.values), packed.unpacked(), strict=True):
        assert torch.equal(read, stored)
    (layer.keys * weights + layer.values).sum().backward()
    assert keys.grad is not None and values.grad is not None
    assert torch.equal(keys.grad, weights) and torch.equal(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"bits": 4, "group": 0}, {"bits": 4, "residual": -1}])
def test_wrong_settings_are_one_line(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{list(wrong)[-1]}=[^\n]+$"):
        PairQuantisation(**wrong)


def test_heads_that_fill_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="bits=2: heads of 6 numbers fill no whole bytes"):
        PackedPairs.of(torch.zeros(1, 1, 3, 6), torch.zeros(1, 1, 3, 6), PairQuantisation(2))
