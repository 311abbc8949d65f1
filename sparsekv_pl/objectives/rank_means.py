"""How ranks with a batch each come to the loss that one process has on all their batches together."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_available, is_initialized


def rank_share(count: Tensor) -> Tensor:
    """() float32: this rank's ``count`` over the mean of all ranks' counts; 1 in a single process.

    Strategies average gradients over ranks, however many tokens each has. A mean over this rank's ``count`` things,
    times this, so becomes the mean over the things of all ranks. 0 where no rank has any. All ranks must call it.
    """
    if not _several():
        return torch.ones((), device=count.device)
    own = count.detach().float()
    return own / _mean(own).clamp(min=torch.finfo(own.dtype).tiny)


def means_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each scalar's mean over ranks, detached, in one exchange. All ranks must call it, with the same names."""
    own = {name: value.detach() for name, value in values.items()}
    if not own or not _several():
        return own
    return dict(zip(own, _mean(torch.stack([value.float() for value in own.values()])).unbind(), strict=True))


def _several() -> bool:
    return is_available() and is_initialized() and get_world_size() > 1


def _mean(values: Tensor) -> Tensor:
    total = values.clone()
    all_reduce(total, ReduceOp.SUM)  # gloo cannot average
    return total / get_world_size()
