"""Objectives that make student and teacher agree on the inside."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.selection import Form, Heads, SelectionLoss


@dataclass
class SelectionObjective(Objective):
    """Align the press's own scores with the attention the teacher pays.

    Parameters
    ----------
    sinks, heads, form, temperature, top_share, layer_weights
        See selection.SelectionLoss.
    """

    sinks: int = 4
    heads: Heads = "mass"
    form: Form = "cross_entropy"
    temperature: float = 1.0
    top_share: float = 0.25
    layer_weights: list[float] | None = None
    request = Request(teacher=True, scores=True)

    def __post_init__(self) -> None:
        try:
            self._loss()
        except ValueError as error:
            raise ValueError(f"SelectionObjective.{error}") from None

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        losses = self._loss()(view.selections)
        if not losses:  # a press without trainable scores was drawn at this step
            return {"loss": 0 * view.hidden_NE.sum()}  # keeps its graph: backward needs one
        logs = {f"selection/{press}": loss.detach() for press, loss in losses.items()}
        return {"loss": torch.stack(list(losses.values())).mean(), **logs}

    def _loss(self) -> SelectionLoss:
        return SelectionLoss(self.sinks, self.heads, self.form, self.temperature, self.top_share, self.layer_weights)
