"""Collect every layer's output for the newest tokens during a forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import attentions, linear_layers

LayerOutput = Literal["hidden", "attention"]
"""The residual stream after a layer, or the output of its attention (or what it has instead) before the addition."""


@contextmanager
def layer_outputs(model: PreTrainedModel, kind: LayerOutput, last: int | None = None) -> Iterator[dict[int, Tensor]]:
    """Collect layer -> (B, T, E) from the last forward inside the block; differentiable.

    T counts that forward's tokens; with ``last``, only the newest ``last`` tokens, without holding memory of others.
    """
    outputs: dict[int, Tensor] = {}

    def record(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        outputs[layer] = hidden if last is None or hidden.shape[1] <= last else hidden[:, -last:].clone()

    layers = decoder_of(model).layers
    mixers = linear_layers(model) | attentions(model)
    watched = list(layers) if kind == "hidden" else [mixers[index] for index in range(len(layers))]
    hooks = [module.register_forward_hook(partial(record, index)) for index, module in enumerate(watched)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
