"""Per-case values, kept one by one so that intervals and paired comparisons are possible afterwards."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class CaseValues(Metric):
    """One (value, count) pair per case: (1 or 0, 1) for retrieval, (summed nll, tokens) for perplexity.

    Cases are told apart by their index, so that ranks may see them in any order and a case repeated to even out ranks
    counts once.
    """

    higher_is_better = None
    is_differentiable = False
    index: list[Tensor]
    value: list[Tensor]
    count: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("index", "value", "count"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """No cases, as tensors: a rank that meets none gathers with the others, and torchmetrics would guess dtypes."""
        super().reset()
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        self.update(none, none, none)

    def update(self, index: Tensor, value: Tensor, count: Tensor) -> None:
        """Add cases: three (M,) tensors."""
        self.index.append(index)
        self.value.append(value.double())
        self.count.append(count)

    def compute(self) -> tuple[Tensor, Tensor]:
        """(values, counts), both (cases,), ordered by case."""
        index = dim_zero_cat(self.index)
        order = index.argsort(stable=True)
        ordered = index[order]
        first = ordered.diff(prepend=ordered[:1] - 1) != 0
        kept = order[first]
        return dim_zero_cat(self.value)[kept], dim_zero_cat(self.count)[kept]
