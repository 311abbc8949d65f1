"""The objective that makes student and teacher agree layer by layer, without a vocabulary."""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.layer_outputs import LayerOutput
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.rank_means import rank_share

SMALL = 0.01
"""Of the layer's median squared norm: squared norms below it count as this much."""
TINY = 1e-12


@dataclass
class Layerwise(Objective):
    """Match what every layer makes of the supervised tokens to what the teacher, with the full cache, makes of them.

    A layer's loss is the mean over supervised tokens of ||s - t||^2 / ||t||^2, with s the student's and t the teacher's
    output: 0 where they agree, 1 where the student says nothing. The relative form lets layers be averaged, whose
    outputs differ in size by orders of magnitude; a floor under ||t||^2 keeps tokens with a tiny output from ruling
    the mean. Hint losses (https://arxiv.org/abs/1412.6550) match hidden states so, there as an absolute error. Computed
    in float32; the teacher gets no gradient.

    Parameters
    ----------
    match
        "hidden": the residual stream after each layer. "attention": what the layer's attention adds to it, which is
        the one place where an eviction acts.
    layer_weights
        One per layer, not negative; the loss is the weighted mean. None weighs all alike.
    """

    match: LayerOutput = "hidden"
    layer_weights: list[float] | None = None

    def __post_init__(self) -> None:
        if self.match not in get_args(LayerOutput):
            raise ValueError(f"Layerwise.match={self.match!r} must be one of {', '.join(get_args(LayerOutput))}")
        weights = self.layer_weights
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(f"Layerwise.layer_weights={weights}: give none below 0 and at least one above")
        self.request = Request(teacher=True, layers=frozenset({self.match}))

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        student, teacher = view.layers[self.match]
        weights = [1.0] * len(student) if self.layer_weights is None else self.layer_weights
        if len(weights) != len(student):
            raise ValueError(
                f"Layerwise.layer_weights has {len(weights)} weights for the {len(student)} layers of this model: give "
                "one for each"
            )
        first = view.hidden_NE.device  # layers may lie on several
        errors = torch.stack([relative_error(student[layer], teacher[layer]).to(first) for layer in sorted(student)])
        share = rank_share(errors.new_tensor(len(view.labels_N)))
        loss = share * (errors * errors.new_tensor(weights)).sum() / sum(weights)
        return {"loss": loss, f"layerwise_{self.match}": loss.detach()}


def relative_error(student_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """() float32: the mean over N tokens of ||s - t||^2 / ||t||^2; 0 where N is 0. See ``Layerwise``."""
    student, teacher = student_NE.float(), teacher_NE.detach().float()
    norms = teacher.square().sum(-1)
    floor = (SMALL * norms.median()).clamp(min=TINY)
    errors = (student - teacher).square().sum(-1) / norms.maximum(floor)
    return errors.sum() / max(1, len(norms))
