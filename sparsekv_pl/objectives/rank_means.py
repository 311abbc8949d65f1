"""Means over ranks that equal those of one process with the batches of all ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_available, is_initialized


def rank_share(count: Tensor) -> Tensor:
    """Divide this rank's ``count`` by the mean of all ranks' counts, () float32; 1 in a single process.

    Strategies average gradients over ranks, whatever the number of tokens on each. A mean over this rank's ``count``
    items, times this factor, averages to the mean over the items of all ranks. 0 if no rank has any. Collective: all
    ranks must call it.
    """
    if not _several():
        return torch.ones((), device=count.device)
    own = count.detach().float()
    return own / _mean(own).clamp(min=torch.finfo(own.dtype).tiny)


def means_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average each scalar over ranks, detached, in one exchange. All ranks must call it, with the same names."""
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
