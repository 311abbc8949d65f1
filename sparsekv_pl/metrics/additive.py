"""What every metric here shares: states that add up, and torchmetrics' keywords and plots."""

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
        """Figure and axes of ``val``, or of what is computed now; several values become curves, a matrix its mean."""
        shown = self.compute() if val is None else val
        return self._plot([_means(one) for one in shown] if isinstance(shown, list | tuple) else _means(shown), ax)


def _means(computed: Any) -> Any:
    """Scalars, which is what torchmetrics draws; what holds NaN is averaged without it."""
    if isinstance(computed, dict):
        return {name: value.nanmean() for name, value in computed.items()}
    return computed.nanmean()
