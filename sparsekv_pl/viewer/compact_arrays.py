"""Compact encodings of what a page shows: a bit for every kept pair, two bytes for every attention mass."""

import base64
import zlib

import numpy as np
from numpy.typing import NDArray

OCTAVES = 32
"""Masses below 2**-OCTAVES are stored as 0."""
STEPS = 2**16 - 2
"""Steps of the logarithmic scale from 2**-OCTAVES to 1: neighbours differ by 0.03 %."""


def packed_bits(kept: NDArray[np.bool_]) -> str:
    """Encode ``kept`` (layers, K, L) as base64, eight tokens to a byte, the first in the highest bit."""
    return base64.b64encode(np.packbits(kept.ravel()).tobytes()).decode()


def packed_masses(mass: NDArray[np.float32]) -> str:
    """Encode ``mass`` (layers, K, L), between 0 and 1, as base64 of little-endian uint16 on a logarithmic scale.

    Code 0 is a mass of 0, code c is 2 ** (OCTAVES * ((c - 1) / STEPS - 1)).
    """
    octave = np.log2(np.clip(mass, 2.0**-OCTAVES, 1, dtype=np.float64))
    code = 1 + np.rint((octave / OCTAVES + 1) * STEPS)
    return base64.b64encode(np.where(mass < 2.0**-OCTAVES, 0, code).astype("<u2").tobytes()).decode()


def joined(parts: list[str]) -> str:
    """Join base64 texts to one of their bytes in sequence, deflated (zlib)."""
    return base64.b64encode(zlib.compress(b"".join(map(base64.b64decode, parts)), 9)).decode()
