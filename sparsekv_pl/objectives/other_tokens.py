"""Objectives over tokens, applied to other tokens than the continuation under eviction."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.eit import EIT
from sparsekv_pl.objectives.lm import LM
from sparsekv_pl.objectives.objective import Objective, StudentView


@dataclass
class OtherTokens(Objective):
    """Apply ``objective`` to the view of other tokens that a step's view holds under ``wanted``.

    Raises
    ------
    ValueError
        For an objective that needs more than tokens.
    """

    wanted: ClassVar[str]
    """The name of the tokens' view in ``StudentView``; the terms are logged as ``NAME/TERM``."""
    asks: ClassVar[Request]
    """The request for that view."""
    objective: Objective = field(default_factory=EIT)

    def __post_init__(self) -> None:
        if type(self.objective) not in (EIT, LM):
            own = type(self).__name__
            raise ValueError(
                f"{own}.objective is {type(self.objective).__name__}: give one over tokens, EIT or LM, and others "
                f"beside {own} in Mixed"
            )
        self.request = self.objective.request | self.asks

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        tokens: StudentView | None = getattr(view, self.wanted)
        assert tokens is not None
        terms = self.objective(tokens)
        return {"loss": terms.pop("loss"), **{f"{self.wanted}/{name}": value for name, value in terms.items()}}
