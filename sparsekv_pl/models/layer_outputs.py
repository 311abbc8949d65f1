"""What every layer of a model makes of the newest tokens, collected from a forward as it happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of

LayerOutput = Literal["hidden", "attention"]
"""The residual stream after a layer, or what its attention adds to it."""


@contextmanager
def layer_outputs(model: PreTrainedModel, kind: LayerOutput, last: int | None = None) -> Iterator[dict[int, Tensor]]:
    """layer -> (B, T, E), of the last forward inside the block; T are the tokens of that forward. Differentiable.

    With ``last``, T is at most that many, the newest, and the memory of the others is not held.
    """
    outputs: dict[int, Tensor] = {}

    def note(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        outputs[layer] = hidden if last is None or hidden.shape[1] <= last else hidden[:, -last:].clone()

    layers = decoder_of(model).layers
    watched = [layer if kind == "hidden" else layer.self_attn for layer in layers]
    hooks = [module.register_forward_hook(partial(note, index)) for index, module in enumerate(watched)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
