"""The base class of metrics: additive states, and torchmetrics' keywords and plots."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

Computed = Tensor | dict[str, Tensor]


class AdditiveMetric(Metric):
    """A metric whose states add up over batches, ranks and other metrics of its class (``merge_state``).

    Keywords of ``torchmetrics.Metric`` (``dist_sync_on_step``, ``compute_on_cpu``, ...) are passed on to it.
    """

    full_state_update = False
    is_differentiable = False

    def plot(self, val: Computed | Sequence[Computed] | None = None, ax: Any = None) -> Any:
        """Plot ``val``, or the present result, and return figure and axes; several values become curves.

        A matrix is averaged to a scalar.
        """
        shown = self.compute() if val is None else val
        return self._plot([_means(one) for one in shown] if isinstance(shown, list | tuple) else _means(shown), ax)


def _means(computed: Any) -> Any:
    """Average results to scalars, which torchmetrics can plot; NaN is left out."""
    if isinstance(computed, dict):
        return {name: value.nanmean() for name, value in computed.items()}
    return computed.nanmean()
