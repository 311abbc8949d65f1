"""What training minimises. Each objective says what it needs to see, and returns named terms."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparsekv_pl.losses import CHUNK_TOKENS, distillation_loss
from sparsekv_pl.selection import Selection, SelectionLoss


@dataclass
class StudentView:
    """One training step as an objective sees it. N counts supervised tokens."""

    hidden_NE: Tensor
    """The student's hidden states, under eviction."""
    labels_N: Tensor
    head_weight_VE: Tensor
    teacher_NE: Tensor | None = None
    """The teacher's hidden states, with the full cache; None unless ``needs_teacher``."""
    teacher_head_weight_VE: Tensor | None = None
    selections: list[Selection] = field(default_factory=list)
    """Scores of every scorer and layer; empty unless ``needs_selections``."""
    teacher_mass: dict[int, Tensor] = field(default_factory=dict)
    """layer -> (B, K, L): see selection.AttentionMass."""


class Objective(ABC):
    """A loss with named terms."""

    needs_teacher: bool = False
    needs_selections: bool = False

    @abstractmethod
    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        """Scalar terms; ``"loss"`` is what training minimises, the rest is logged."""


@dataclass
class LM(Objective):
    """Next-token cross-entropy under eviction.

    Parameters
    ----------
    chunk_tokens
        Tokens whose logits exist at once; memory against launch overhead, not the result.
    """

    chunk_tokens: int = CHUNK_TOKENS

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = distillation_loss(
            view.hidden_NE,
            None,
            view.head_weight_VE,
            view.labels_N,
            kl_weight=0.0,
            chunk_tokens=self.chunk_tokens,
        )
        return {"loss": terms.loss, "cross_entropy": terms.cross_entropy}


@dataclass
class EIT(Objective):
    """Eviction-Invariant Training: cross-entropy + kl_weight * KL(teacher || student), both under eviction.

    Parameters
    ----------
    kl_weight
        lambda.
    temperature
        Of both distributions in the KL term.
    """

    kl_weight: float = 1.0
    temperature: float = 1.0
    chunk_tokens: int = CHUNK_TOKENS
    needs_teacher = True

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight} must not be negative")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = distillation_loss(
            view.hidden_NE,
            view.teacher_NE,
            view.head_weight_VE,
            view.labels_N,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            teacher_head_weight_VE=view.teacher_head_weight_VE,
            chunk_tokens=self.chunk_tokens,
        )
        return {"loss": terms.loss, "cross_entropy": terms.cross_entropy, "kl": terms.kl}


@dataclass
class SelectionObjective(Objective):
    """Align the press's own scores with the attention the teacher pays: see selection.SelectionLoss."""

    sinks: int = 4
    heads: Literal["mass", "equal"] = "mass"
    needs_teacher = True
    needs_selections = True

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        losses = SelectionLoss(self.sinks, self.heads)(view.selections, view.teacher_mass)
        if not losses:  # a press without trainable scores was drawn at this step
            return {"loss": 0 * view.hidden_NE.sum()}  # keeps its graph: backward needs one
        logs = {f"selection/{press}": loss.detach() for press, loss in losses.items()}
        return {"loss": torch.stack(list(losses.values())).mean(), **logs}


@dataclass
class Mixed(Objective):
    """A weighted sum of objectives.

    Parameters
    ----------
    objectives
        What to add up.
    weights
        One per objective; all 1 if not given.
    """

    objectives: list[Objective]
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("Mixed.objectives is empty: name at least one objective")
        if self.weights is None:
            self.weights = [1.0] * len(self.objectives)
        if len(self.weights) != len(self.objectives):
            raise ValueError(
                f"Mixed.weights={self.weights}: give one weight for each of {len(self.objectives)} objectives"
            )
        self.needs_teacher = any(objective.needs_teacher for objective in self.objectives)
        self.needs_selections = any(objective.needs_selections for objective in self.objectives)

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        losses = []
        for objective, weight in zip(self.objectives, self.weights or [], strict=True):
            own = objective(view)
            losses.append(weight * own.pop("loss"))
            terms.update(own)
        return {"loss": torch.stack(losses).sum(), **terms}
