"""Objectives that make student and teacher agree on the inside."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.selection import SelectionLoss


@dataclass
class SelectionObjective(Objective):
    """Align the press's own scores with the attention the teacher pays: see selection.SelectionLoss."""

    sinks: int = 4
    heads: Literal["mass", "equal"] = "mass"
    needs_teacher = True
    needs_selections = True

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        losses = SelectionLoss(self.sinks, self.heads)(view.selections)
        if not losses:  # a press without trainable scores was drawn at this step
            return {"loss": 0 * view.hidden_NE.sum()}  # keeps its graph: backward needs one
        logs = {f"selection/{press}": loss.detach() for press, loss in losses.items()}
        return {"loss": torch.stack(list(losses.values())).mean(), **logs}
