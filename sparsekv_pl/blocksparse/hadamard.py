"""A subsampled randomised Hadamard transform: fewer coordinates, with inner products kept in expectation.

Ailon and Chazelle 2009 (https://doi.org/10.1137/060673096) and Tropp 2011 (https://arxiv.org/abs/1011.1595), with
coordinates drawn without replacement. Random signs and the transform spread every vector evenly over all coordinates,
so that a few coordinates represent it.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsekv_pl.models.seeding import generator_for


class SubsampledHadamard(nn.Module):
    """Maps (..., dim) to (..., sketch_dim) linearly. Only results of the same object are comparable.

    The input is padded with zeros to n, the next power of two, multiplied by random signs and transformed;
    ``sketch_dim`` coordinates are kept and scaled by sqrt(n / sketch_dim). The expectation over seeds of the results'
    inner products is that of the inputs; with ``sketch_dim`` = n they are equal for every seed. Signs and coordinates
    follow from ``seed`` and are the same on every device. Raises ``ValueError`` for a ``sketch_dim`` below 1 or above
    n.
    """

    signs: Tensor
    """(dim,) float32, -1 or 1."""
    coordinates: Tensor
    """(sketch_dim,) int64, ascending."""

    def __init__(self, dim: int, sketch_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.size = 1 << (dim - 1).bit_length()
        if not 1 <= sketch_dim <= self.size:
            raise ValueError(
                f"sketch_dim={sketch_dim} must be between 1 and {self.size}, the next power of two of {dim} "
                f"coordinates: use sketch_dim={self.size} to keep inner products as they are"
            )
        generator = generator_for("sketch", seed)
        signs = torch.randint(2, (dim,), generator=generator) * 2.0 - 1
        coordinates = torch.randperm(self.size, generator=generator)[:sketch_dim].sort().values
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("coordinates", coordinates, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim) to (..., sketch_dim), in x's dtype and on this module's device."""
        signed = pad(x * self.signs.to(x.dtype), (0, self.size - x.shape[-1]))
        scale = (self.size / len(self.coordinates)) ** 0.5
        return scale * walsh_hadamard(signed)[..., self.coordinates]


def walsh_hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of x (..., n) in Sylvester's order, in n log n steps.

    Raises ``ValueError`` if n is not a power of two.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"{size} coordinates have no Walsh-Hadamard transform: fill up to a power of two")
    width = 1
    while width < size:
        even, odd = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack([even + odd, even - odd], dim=-2).flatten(-3)
        width *= 2
    return x * size**-0.5
