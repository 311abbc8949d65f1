"""Seeds of all random generators: a hash of the draw's purpose and of numbers such as seed and step.

Generators of different purposes are independent at equal seeds and steps, because the hash includes the purpose. A draw
is a function of its name alone, so every rank and every resumed run draws the same.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(purpose: str, *parts: int | str) -> int:
    """Hash ``purpose`` and ``parts``, such as seed and step, to a seed of 63 bits."""
    digest = hashlib.blake2b(_name(purpose, parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(purpose: str, *parts: int | str) -> torch.Generator:
    """Return a torch CPU generator seeded by ``seed_for``; torch uses the lowest 32 bits."""
    return torch.Generator().manual_seed(seed_for(purpose, *parts))


def random_for(purpose: str, *parts: int | str) -> random.Random:
    """Return a Python generator seeded by the whole name, which Python hashes with SHA-512."""
    return random.Random(_name(purpose, parts))


@contextmanager
def globally_seeded(purpose: str, *parts: int | str) -> Iterator[None]:
    """Inside the block torch's global generators, the GPUs' too, are as ``seed_for`` seeds them; then as before.

    For what draws from them and takes no generator: kvpress's presses.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        seed = seed_for(purpose, *parts)
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


def _name(purpose: str, parts: tuple[int | str, ...]) -> str:
    return "/".join([purpose, *map(str, parts)])
