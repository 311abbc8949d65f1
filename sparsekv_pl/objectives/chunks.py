"""Supervise the context itself: every chunk after the first is a continuation of the evicted cache."""

from dataclasses import dataclass, field

from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.eit import EIT
from sparsekv_pl.objectives.lm import LM
from sparsekv_pl.objectives.objective import Objective, StudentView


@dataclass
class Chunks(Objective):
    """Apply an objective over tokens to the context's chunks after the first.

    Each of their tokens sees its own chunk in full and what the eviction kept of the chunks before, and predicts the
    next token. So most of what is read carries loss, not the continuation alone; the context needs several chunks
    (``RealEviction.chunk_tokens``). Use it in ``Mixed``, beside the continuation's own objective.

    Parameters
    ----------
    objective
        EIT or LM; its terms are logged as ``chunks/TERM``.

    Raises
    ------
    ValueError
        For another objective, which needs more than tokens.
    """

    objective: Objective = field(default_factory=EIT)

    def __post_init__(self) -> None:
        if type(self.objective) not in (EIT, LM):
            raise ValueError(
                f"Chunks.objective is {type(self.objective).__name__}: give one over tokens, EIT or LM, and others "
                "beside Chunks in Mixed"
            )
        self.request = self.objective.request | Request(chunks=True)

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        assert view.chunks is not None
        terms = self.objective(view.chunks)
        return {"loss": terms.pop("loss"), **{f"chunks/{name}": value for name, value in terms.items()}}
