"""A weighted sum of objectives."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.selection_loss import SelectionLoss


@dataclass
class Mixed(Objective):
    """A weighted sum of objectives.

    If two objectives log a term of the same name, the later one's gets its number: ``cross_entropy_2`` is the second's.

    Parameters
    ----------
    objectives
        The objectives to add up.
    weights
        One weight per objective, at least 0; all 1 if not given.

    Raises
    ------
    ValueError
        For an empty list, or weights that are negative, all 0 or not one per objective.
    """

    objectives: list[Objective]
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("Mixed.objectives is []: name at least one objective")
        if self.weights is None:
            self.weights = [1.0] * len(self.objectives)
        sound = all(0 <= weight < math.inf for weight in self.weights) and any(self.weights)
        if len(self.weights) != len(self.objectives) or not sound:
            raise ValueError(
                f"Mixed.weights={self.weights}: give one finite weight, not negative, for each of "
                f"{len(self.objectives)} objectives, and at least one above 0"
            )
        self.request = reduce(or_, (objective.request for objective in self.objectives))

    @property
    @override
    def selection_loss(self) -> SelectionLoss | None:
        """The first objective's that has one."""
        return next(filter(None, (objective.selection_loss for objective in self.objectives)), None)

    def prepare(self, tokenizer: Any) -> None:
        """Prepare all objectives with the model's tokenizer."""
        for objective in self.objectives:
            objective.prepare(tokenizer)

    def check_layers(self, layers: int, evicted: Sequence[int]) -> None:
        """Check the weights by layer of all objectives."""
        for objective in self.objectives:
            objective.check_layers(layers, evicted)

    def check_context(self, tokens: int) -> None:
        """Check the contexts of all objectives."""
        for objective in self.objectives:
            objective.check_context(tokens)

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        losses = []
        for place, (objective, weight) in enumerate(zip(self.objectives, self.weights or [], strict=True), start=1):
            own = objective(view)
            losses.append(weight * own.pop("loss"))
            for name, value in own.items():
                terms[_free(name, place, terms)] = value
        return {"loss": torch.stack(losses).sum(), **terms}


def _free(name: str, place: int, taken: Container[str]) -> str:
    """Return ``name`` if it is free, else ``name`` with the first free number from ``place`` on."""
    number, free = place, name
    while free in taken:
        number, free = number + 1, f"{name}_{number}"
    return free
