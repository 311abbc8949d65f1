"""The layerwise objective: match the student's layer outputs to the teacher's, without logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.layer_outputs import LayerOutput
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.rank_means import rank_share

SMALL = 0.01
"""Lower bound of the teacher's squared norms, as a share of their median in the layer."""
TINY = 1e-12


@dataclass
class Layerwise(Objective):
    """Match every layer's output at supervised tokens to that of the teacher with the full cache.

    A layer's loss is the mean over supervised tokens of ||s - t||^2 / ||t||^2, with s the student's and t the teacher's
    output: 0 if they agree, 1 if the student's output is zero. The relative error makes layers comparable, whose
    outputs differ in size by orders of magnitude; a lower bound on ||t||^2 keeps tokens with a tiny output from
    dominating the mean. Hint losses (https://arxiv.org/abs/1412.6550) match hidden states by an absolute error.
    Computed in float32; the teacher gets no gradient.

    Parameters
    ----------
    match
        "hidden": the residual stream after each layer. "attention": the layer's attention output before it is added to
        the residual stream, the only place where an eviction acts.
    layer_weights
        One weight per layer, at least 0; the loss is the weighted mean. None weighs all layers equally.

    Raises
    ------
    ValueError
        For an unknown ``match``, or weights that are negative, all 0 or not one per layer.
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

    def check_layers(self, layers: int, evicted: Sequence[int]) -> None:  # noqa: ARG002 - outputs of all are matched
        """Raise ``ValueError`` if there is not one weight per layer of the model."""
        if self.layer_weights is not None and len(self.layer_weights) != layers:
            raise ValueError(
                f"Layerwise.layer_weights has {len(self.layer_weights)} weights for the {layers} layers of this model: "
                "give one for each"
            )

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        student, teacher = view.layers[self.match]
        weights = [1.0] * len(student) if self.layer_weights is None else self.layer_weights
        first = view.hidden_NE.device  # layers may lie on several
        errors = torch.stack([relative_error(student[layer], teacher[layer]).to(first) for layer in sorted(student)])
        share = rank_share(errors.new_tensor(len(view.labels_N)))
        loss = share * (errors * errors.new_tensor(weights)).sum() / sum(weights)
        return {"loss": loss, f"layerwise_{self.match}": loss.detach()}


def relative_error(student_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """Mean over N tokens of ||s - t||^2 / ||t||^2, () float32; 0 if N is 0. See ``Layerwise``."""
    student, teacher = student_NE.float(), teacher_NE.detach().float()
    norms = teacher.square().sum(-1)
    floor = (SMALL * norms.median()).clamp(min=TINY)
    errors = (student - teacher).square().sum(-1) / norms.maximum(floor)
    return errors.sum() / max(1, len(norms))
