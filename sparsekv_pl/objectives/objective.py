"""The interface of objectives, and the view of a training step that they get."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekv_pl.eviction.interface import EvictedContext, Selection
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.head import Head
from sparsekv_pl.models.layer_outputs import LayerOutput

if TYPE_CHECKING:
    from sparsekv_pl.objectives.selection_loss import SelectionLoss

LayerRows = dict[int, Tensor]
"""layer -> (N, E), the layer's output at supervised tokens."""


@dataclass
class StudentView:
    """The tensors of one training step that an objective computes its loss from. N counts supervised tokens."""

    hidden_NE: Tensor
    """The student's hidden states (N, E), under eviction."""
    labels_N: Tensor
    """(N,) int64, the token that each hidden state predicts."""
    head: Head | Tensor
    """The student's LM head; a tensor is its weight (V, E)."""
    teacher_NE: Tensor | None = None
    """The teacher's hidden states (N, E), with the full cache; None unless requested."""
    teacher_head: Head | Tensor | None = None
    """The teacher's LM head; None if it is the student's."""
    selections: list[tuple[Selection, Tensor]] = field(default_factory=list)
    """Scores of every scorer and layer, each with the teacher's attention to the context in that layer, (B, K, L) (see
    ``AttentionMass``); empty unless ``scores`` are requested."""
    scorers: list[str] = field(default_factory=list)
    """Names of all scorers of the press, also of those that score nothing at this step: the same on all ranks."""
    layers: dict[LayerOutput, tuple[LayerRows, LayerRows]] = field(default_factory=dict)
    """Student's and teacher's layer outputs, for the kinds requested."""
    press_losses: dict[str, Tensor] = field(default_factory=dict)
    """Name -> scalar loss term of a press (SparseRegPress)."""
    contexts: list[EvictedContext] = field(default_factory=list)
    """The evicted contexts, which an objective can continue; empty unless requested."""
    chunks: "StudentView | None" = None
    """The tokens of the context's chunks after the first, each predicting the next one; None unless requested."""
    first_chunk: "StudentView | None" = None
    """The tokens of the context's first chunk, each predicting the next one; None unless requested."""
    full_cache: "StudentView | None" = None
    """The same tokens after the cache as it was before the eviction; None unless requested."""


def joined(views: Sequence[StudentView], rows: Sequence[int]) -> StudentView:
    """Join the views of parts of a batch, with ``rows`` rows each, to one view of the batch.

    Token means then weigh all supervised tokens of the batch equally, press losses weigh all rows equally, and a
    selection loss weighs rows as in a single part.
    """
    if len(views) == 1:
        return views[0]
    others = {
        name: [part for view in views if (part := getattr(view, name)) is not None]
        for name in ("chunks", "first_chunk", "full_cache")
    }
    teachers = [view.teacher_NE for view in views if view.teacher_NE is not None]
    shares = [count / sum(rows) for count in rows]
    return StudentView(
        hidden_NE=torch.cat([view.hidden_NE for view in views]),
        labels_N=torch.cat([view.labels_N for view in views]),
        head=views[0].head,
        teacher_NE=torch.cat(teachers) if teachers else None,
        teacher_head=views[0].teacher_head,
        selections=[pair for view in views for pair in view.selections],
        scorers=views[0].scorers,
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
        **{name: joined(parts, rows) for name, parts in others.items() if parts},
    )


def _stacked(parts: Sequence[LayerRows]) -> LayerRows:
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


class Objective(ABC):
    """A training loss with named terms."""

    request: Request = NOTHING
    """The results that its ``StudentView`` must contain."""

    @property
    def selection_loss(self) -> "SelectionLoss | None":
        """The selection loss that this objective minimises; None if it has none."""
        return None

    def prepare(self, tokenizer: Any) -> None:  # noqa: B027 - most objectives do not need it
        """Prepare for the model's tokenizer; called once, before training."""

    def check_layers(self, layers: int, evicted: Sequence[int]) -> None:  # noqa: B027 - most objectives do not need it
        """Raise ``ValueError`` if weights by layer do not suit a model with ``layers`` layers; called before training.

        ``evicted`` are those in which presses evict.
        """

    def check_context(self, tokens: int) -> None:  # noqa: B027 - most objectives do not need it
        """Raise ``ValueError`` if it cannot supervise contexts of ``tokens`` tokens; called before training."""

    @abstractmethod
    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        """Return scalar terms by name: ``"loss"`` is minimised, the others are logged."""
