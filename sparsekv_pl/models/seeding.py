"""The one place where random generators are seeded: by what is drawn for, and the numbers that name the draw.

Generators of different purposes are independent at equal seeds and steps, because a hash of the whole name seeds them.
A draw is a function of its name alone, so every rank and every resumed run draws what the first one drew.
"""

import hashlib
import random

import torch


def seed_for(purpose: str, *parts: int | str) -> int:
    """63 bits, for what only takes a number as its seed: a hash of ``purpose`` and ``parts``, such as seed and step."""
    digest = hashlib.blake2b(_name(purpose, parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(purpose: str, *parts: int | str) -> torch.Generator:
    """A CPU generator for torch, as ``seed_for`` seeds it. torch reads the lowest 32 bits."""
    return torch.Generator().manual_seed(seed_for(purpose, *parts))


def random_for(purpose: str, *parts: int | str) -> random.Random:
    """A generator for plain Python. It hashes the whole name (SHA-512) by itself."""
    return random.Random(_name(purpose, parts))


def _name(purpose: str, parts: tuple[int | str, ...]) -> str:
    return "/".join([purpose, *map(str, parts)])
