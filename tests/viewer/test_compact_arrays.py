"""The page's arrays: exact bits, masses within 0.03 %, and a page that stays small at its worst."""

import base64
import zlib

import numpy as np

from sparsekv_pl.evaluation.view_pages import view_pages
from sparsekv_pl.viewer.compact_arrays import OCTAVES, STEPS, joined, packed_bits, packed_masses

SIZE = 3_000_000
"""Bytes of a page of 2,000 tokens, 6 presses, 3 ratios and all heads of the embedded model, base and trained."""


def test_bits_come_back() -> None:
    kept = np.random.default_rng(0).random((2, 3, 13)) < 0.3
    raw = np.frombuffer(base64.b64decode(packed_bits(kept)), np.uint8)
    assert np.array_equal(np.unpackbits(raw)[: kept.size].reshape(kept.shape), kept)


def test_masses_come_back_in_their_order() -> None:
    mass = np.array([0, 1e-12, 1e-9, 3e-5, 0.01, 0.01001, 0.5, 1], np.float32)
    code = np.frombuffer(base64.b64decode(packed_masses(mass)), "<u2").astype(float)
    back = np.where(code == 0, 0, 2 ** (OCTAVES * ((code - 1) / STEPS - 1)))
    np.testing.assert_allclose(back[2:], mass[2:], rtol=3e-4)
    assert back[:2].tolist() == [0, 0] and (np.diff(back[2:]) > 0).all()


def test_parts_are_joined_in_sequence() -> None:
    parts = [base64.b64encode(part).decode() for part in (b"ab", b"c")]
    assert zlib.decompress(base64.b64decode(joined(parts))) == b"abc"


def test_a_page_of_random_choices_is_small() -> None:
    """Nothing compresses worse than chance."""
    draw, shape = np.random.default_rng(0), (30, 3, 2000)
    names = [(f"Press{press}", ratio) for press in range(6) for ratio in (0.5, 0.75, 0.9)]
    views, cases = [], []
    for variant in ("base", "trained"):
        kept = {
            f"{name}_{ratio}_dense".replace(".", "-"): packed_bits(draw.random(shape) > ratio) for name, ratio in names
        }
        mass = packed_masses(draw.exponential(1 / 2000, shape).clip(max=1).astype(np.float32))
        view = {"viewed": "a", "variant": variant, "question": "?", "expected": ["x"], "marked": [], "unknown": {}}
        views.append(view | {"tokens": [" words"] * 2000, "layers": 30, "heads": 3, "kept": kept, "mass": mass})
        for name, ratio in names:
            where = {"case": "a", "variant": variant, "press": name, "compression_ratio": ratio}
            cases.append(where | {"answer": "y " * 30, "exact": 1.0, "answer_prefix": "a", "kept_pairs": 2000.0})
    (page,) = view_pages([*views, *cases], 1, "Worst", {}).values()
    assert 1_000_000 < len(page[1]) < SIZE
