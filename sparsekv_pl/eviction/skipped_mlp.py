"""What nobody reads of a prefill: of the last layer only keys and values outlive it, so its MLP has nothing to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.presses.shadowed_method import shadowed


@contextmanager
def last_mlp_for(model: PreTrainedModel, newest: int) -> Iterator[None]:
    """Inside the block ``model``'s last MLP computes the ``newest`` tokens of a forward; the others' output is void.

    Nothing else changes: layers before it, keys and values, and what a press sees are whole. Experts, which a router
    feeds token by token, compute everything.
    """
    mlp = getattr(decoder_of(model).layers[-1], "mlp", None)
    if not hasattr(mlp, "down_proj"):
        yield
        return

    def compute(original: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        void = hidden.shape[1] - newest
        if void <= 0:
            return original(hidden)
        zeros = torch.zeros_like(hidden[:, :void])
        return torch.cat([zeros, original(hidden[:, void:])], dim=1) if newest else zeros

    with shadowed(mlp, "forward", compute):
        yield
