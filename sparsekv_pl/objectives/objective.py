"""What an objective is, and what it is shown."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekv_pl.eviction.interface import EvictedContext, Selection
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.layer_outputs import LayerOutput

LayerRows = dict[int, Tensor]
"""layer -> (N, E), its output at supervised tokens."""


@dataclass
class StudentView:
    """One training step as an objective sees it. N counts supervised tokens."""

    hidden_NE: Tensor
    """The student's hidden states, under eviction."""
    labels_N: Tensor
    head_weight_VE: Tensor
    teacher_NE: Tensor | None = None
    """The teacher's hidden states, with the full cache; None unless requested."""
    teacher_head_weight_VE: Tensor | None = None
    selections: list[tuple[Selection, Tensor]] = field(default_factory=list)
    """Scores of every scorer and layer, each with the attention (B, K, L) that the teacher pays there (see
    selection.AttentionMass); empty unless ``scores`` are requested."""
    layers: dict[LayerOutput, tuple[LayerRows, LayerRows]] = field(default_factory=dict)
    """Student's and teacher's layer outputs, for the kinds requested."""
    press_losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by name that presses ask to add (SparseRegPress)."""
    contexts: list[EvictedContext] = field(default_factory=list)
    """The evicted contexts, to be asked about; empty unless requested."""


def joined(views: Sequence[StudentView], rows: Sequence[int]) -> StudentView:
    """The views of parts of a batch, of ``rows`` rows each, as one view of the batch.

    What objectives average over tokens weighs every supervised token of the batch the same, press losses weigh every
    row the same, and a selection loss weighs the rows of all parts as it does those of one.
    """
    if len(views) == 1:
        return views[0]
    teachers = [view.teacher_NE for view in views if view.teacher_NE is not None]
    shares = [count / sum(rows) for count in rows]
    return StudentView(
        hidden_NE=torch.cat([view.hidden_NE for view in views]),
        labels_N=torch.cat([view.labels_N for view in views]),
        head_weight_VE=views[0].head_weight_VE,
        teacher_NE=torch.cat(teachers) if teachers else None,
        teacher_head_weight_VE=views[0].teacher_head_weight_VE,
        selections=[pair for view in views for pair in view.selections],
        layers={
            kind: (_stacked([v.layers[kind][0] for v in views]), _stacked([v.layers[kind][1] for v in views]))
            for kind in views[0].layers
        },
        press_losses={
            name: torch.stack(
                [view.press_losses[name] * share for view, share in zip(views, shares, strict=True)]
            ).sum()
            for name in views[0].press_losses
        },
        contexts=[context for view in views for context in view.contexts],
    )


def _stacked(parts: Sequence[LayerRows]) -> LayerRows:
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


class Objective(ABC):
    """A loss with named terms."""

    request: Request = NOTHING
    """What its views have to show."""

    def prepare(self, tokenizer: Any) -> None:  # noqa: B027 - most objectives ask nothing of it
        """Called once, before training, with the model's tokenizer."""

    @abstractmethod
    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        """Scalar terms; ``"loss"`` is what training minimises, the rest is logged."""
