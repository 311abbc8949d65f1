"""One prefill, many presses.

With a dense prefill the cache before eviction does not depend on the press: a press only looks at a layer after the
layer has run. So a context is run once, what each layer's hook would have seen is kept, and every press at every ratio
is applied to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.eviction.prefill import Prefilled, copy_cache, prefill
from sparsekv_pl.presses.scores import presses_in, rerotates_keys


@dataclass
class _Call:
    """One attention layer's forward, as a hook sees it."""

    module: nn.Module
    kwargs: dict[str, Any]
    output: Any


class RecordedPrefill:
    """A dense prefill of a context (B, L) to which presses can be applied one after the other."""

    def __init__(self, model: PreTrainedModel, context_ids: Tensor) -> None:
        self.model = model
        self.context_ids = context_ids
        self.calls: list[_Call] = []
        hooks = [
            layer.self_attn.register_forward_hook(self._note, with_kwargs=True) for layer in model.get_decoder().layers
        ]
        try:
            with torch.no_grad():
                self.cache = prefill(model, context_ids, None).cache
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append(_Call(module, kwargs, output))

    @torch.no_grad()
    def evicted(self, press: BasePress | None) -> Prefilled:
        """The context's cache as ``press`` leaves it: equal to a prefill under that press. None keeps everything.

        A press that runs the model itself (KVzipPress) cannot be replayed and gets a prefill of its own.
        """
        if press is not None and not all(type(inner).__call__ is BasePress.__call__ for inner in presses_in(press)):
            return prefill(self.model, self.context_ids, press)
        cache = copy_cache(self.cache)
        for call in self.calls:
            call.module.masked_key_indices = None  # type: ignore[assignment]  # left by a head-wise press before this one
        if press is not None:
            with press(self.model):
                for call in self.calls:
                    kwargs = {**call.kwargs, "past_key_values": cache}
                    press.forward_hook(call.module, [], kwargs, call.output)
        position = cache.get_seq_length() if rerotates_keys(press) else self.context_ids.shape[1]
        return Prefilled(cache, position, [])
