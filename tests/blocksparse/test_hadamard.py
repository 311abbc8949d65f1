"""The sketch is a subsampled, signed Sylvester-Hadamard matrix, and keeps inner products on average."""

import pytest
import torch
from torch import Tensor

from sparsekv_pl.blocksparse.hadamard import SubsampledHadamard, walsh_hadamard


def sylvester(size: int) -> Tensor:
    """The Hadamard matrix of +-1, doubled from [[1]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_transform_is_the_sylvester_matrix(size: int) -> None:
    x = draws(2, 3, size)
    torch.testing.assert_close(walsh_hadamard(x), x @ sylvester(size) / size**0.5)


@pytest.mark.parametrize(("dim", "size", "sketch_dim"), [(64, 64, 64), (64, 64, 16), (80, 128, 32), (5, 8, 3)])
def test_sketch_is_signs_transform_and_a_choice_of_coordinates(dim: int, size: int, sketch_dim: int) -> None:
    sketch, x = SubsampledHadamard(dim, sketch_dim, seed=4), draws(2, 7, dim)
    signs, coordinates = sketch.signs.double(), sketch.coordinates
    assert sketch.size == size
    assert set(signs.tolist()) == {-1, 1}
    assert len(set(coordinates.tolist())) == sketch_dim
    assert 0 <= int(coordinates.min()) <= int(coordinates.max()) < size
    matrix = torch.diag(signs) @ sylvester(size)[:dim] / size**0.5  # rows of zeros that were filled up fall away
    expected = (x @ matrix)[..., coordinates] * (size / sketch_dim) ** 0.5
    torch.testing.assert_close(sketch(x), expected)


@pytest.mark.parametrize(("dim", "sketch_dim"), [(64, 16), (48, 8)])
def test_inner_products_are_kept_in_expectation(dim: int, sketch_dim: int) -> None:
    x, y = draws(dim, seed=1), draws(dim, seed=2)
    pairs = torch.stack([x, y, x + y])  # norms too: x with itself is among the pairs
    seeds = 2000
    products = torch.stack(
        [a @ a.T for a in (SubsampledHadamard(dim, sketch_dim, seed)(pairs) for seed in range(seeds))]
    )
    error = products.std(0) / seeds**0.5
    assert bool((products.std(0) > 1).all()), "a sketch of fewer coordinates varies"
    # Nine means, each within 4 standard errors: by chance fewer than 1 of 1,000 choices of seeds would fail.
    assert bool(((products.mean(0) - pairs @ pairs.T).abs() < 4 * error).all())


def test_the_seed_decides_everything() -> None:
    x = draws(64)
    torch.manual_seed(1)
    first = SubsampledHadamard(64, 16, seed=5)(x)
    torch.manual_seed(2)
    torch.testing.assert_close(SubsampledHadamard(64, 16, seed=5)(x), first, rtol=0, atol=0)
    assert not torch.equal(SubsampledHadamard(64, 16, seed=6)(x), first)


def test_every_coordinate_is_drawn_as_often() -> None:
    draws_of = torch.cat([SubsampledHadamard(16, 4, seed).coordinates for seed in range(400)]).bincount(minlength=16)
    # Each is in a draw with probability 1/4: 100 of 400, with a standard deviation of 8.7.
    assert 65 < int(draws_of.min()) <= int(draws_of.max()) < 135


def test_moves_between_devices_and_leaves_nothing_in_checkpoints() -> None:
    sketch = SubsampledHadamard(64, 16).to("meta")
    assert sketch(torch.empty(3, 64, device="meta")).shape == (3, 16)
    assert sketch.state_dict() == {}


@pytest.mark.parametrize("sketch_dim", [0, 65, 128])
def test_more_coordinates_than_there_are_is_refused(sketch_dim: int) -> None:
    with pytest.raises(ValueError, match=rf"sketch_dim={sketch_dim} must be .* use sketch_dim=64"):
        SubsampledHadamard(48, sketch_dim)


def test_a_length_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match=r"48 coordinates .* power of two"):
        walsh_hadamard(torch.zeros(48))
