"""The share of the teacher's attention that a press's selection keeps, beside the most that its budget could keep."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeptMass:
    """The attention kept in one layer by one press; all tensors are (B, K) float32, per row and KV head."""

    layer: int
    press: str
    kept: Tensor
    """The share of the teacher's attention to the evictable keys that falls on keys which the press keeps."""
    most: Tensor
    """The largest share that as many evictable keys can hold: ``most - kept`` is what a better order would add."""
    weights: Tensor
    """The weights that the selection loss gives to the heads."""


@torch.no_grad()
def kept_shares(target: Tensor, scores: Tensor, evictable: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return ``KeptMass.kept`` and ``KeptMass.most``.

    ``target`` (B, K, S) are the teacher's shares, 0 where not ``evictable``; the press keeps the ``kept`` highest
    ``scores`` of each head.
    """
    held = torch.zeros_like(evictable).scatter(-1, scores.topk(kept, dim=-1).indices, True)
    return kept_and_most(target, held & evictable, kept)


def kept_and_most(mass: Tensor, held: Tensor, at_most: int) -> tuple[Tensor, Tensor]:
    """Return the ``mass`` on ``held`` keys and the most on as many, (B, K) each, of (B, K, S) and bool.

    No head holds more than ``at_most`` keys.
    """
    counts = held.sum(-1, keepdim=True)
    highest = mass.topk(at_most, dim=-1).values.cumsum(-1)
    most = highest.gather(-1, (counts - 1).clamp(min=0)).where(counts > 0, 0)
    return mass.where(held, 0).sum(-1), most.squeeze(-1)
