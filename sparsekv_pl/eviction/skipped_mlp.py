"""Skip the last layer's MLP in a prefill: only that layer's keys and values are used afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.presses.shadowed_method import shadowed


@contextmanager
def last_mlp_for(model: PreTrainedModel, newest: int) -> Iterator[None]:
    """Compute ``model``'s last MLP for the ``newest`` tokens of a forward alone; the others' output is zero.

    Nothing else changes: earlier layers, keys and values and a press's inputs are complete. Mixture-of-experts layers
    compute everything.
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
