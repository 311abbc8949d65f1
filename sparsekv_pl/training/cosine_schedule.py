"""A learning-rate schedule whose length follows from the training's."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR


class CosineSchedule(CosineAnnealingLR):
    """torch's CosineAnnealingLR, which may be configured without a length.

    Parameters
    ----------
    optimizer, eta_min, last_epoch
        See ``CosineAnnealingLR``.
    T_max
        Optimizer steps until ``eta_min``; null: the training's length, ``trainer.max_steps``, which the command line
        fills in (cli/run_length.py).

    Raises
    ------
    ValueError
        If ``T_max`` is still None.
    """

    def __init__(
        self, optimizer: Optimizer, T_max: int | None = None, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        if T_max is None:
            raise ValueError("CosineSchedule.T_max is null: outside the command line give it the training's length")
        super().__init__(optimizer, T_max, eta_min, last_epoch)
