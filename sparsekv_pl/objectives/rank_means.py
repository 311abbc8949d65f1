"""Means over ranks that equal those of one process with the batches of all ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_available, is_initialized

TINY = torch.finfo(torch.float32).tiny


def rank_share(count: Tensor) -> Tensor:
    """Divide this rank's ``count`` by the mean of all ranks' counts, () float32; 1 in a single process.

    Strategies average gradients over ranks, whatever the number of tokens on each. A mean over this rank's ``count``
    items, times this factor, averages to the mean over the items of all ranks. 0 if no rank has any. Collective: all
    ranks must call it.
    """
    if not _several():
        return torch.ones((), device=count.device)
    own = count.detach().float()
    return own / _mean(own).clamp(min=TINY)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Average ``values`` (n,) of this rank by ``weights`` (n,), (); 0 if all weights are."""
    return (values * weights).sum() / weights.sum().clamp(min=TINY)


def means_by_name(
    found: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """Return the ``weighted_mean`` of each name's values and weights, over the items of all ranks as by ``rank_share``.

    ``names`` are all that any rank may have found, in one order on all ranks. The result has those that some rank has
    found, on every rank: 0 on one that has not. Collective: all ranks must call it; one exchange on ``device``.
    """
    own = {name: weighted_mean(*items) for name, items in found.items()}
    if not names or not _several():
        return own
    assert set(own) <= set(names), (list(own), names)
    zero, one = torch.zeros((), device=device), torch.ones((), device=device)
    totals = torch.stack([found[name][1].detach().float().sum() if name in found else zero for name in names])
    there = torch.stack([one if name in found else zero for name in names])
    mean_totals, mean_there = _mean(torch.stack([totals, there]))
    shares = dict(zip(names, totals / mean_totals.clamp(min=TINY), strict=True))
    # A rank that found all knows the answer: only the others wait for the device.
    anywhere = names if len(own) == len(names) else [names[place] for place in mean_there.nonzero().flatten().tolist()]
    return {name: shares[name] * own.get(name, zero) for name in anywhere}


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
