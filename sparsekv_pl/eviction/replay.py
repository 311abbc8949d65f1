"""One prefill, many presses.

In a dense prefill the cache before eviction does not depend on the press, which only reads a layer after the layer has
run. So a context is run once, the inputs of each layer's hook are kept, and every press at every ratio is applied to
them. Scores that do not depend on the ratio are computed once for all ratios of a press.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kvpress import BasePress, ScorerPress
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.eviction.limits import check_rows, check_weights, check_window
from sparsekv_pl.eviction.other_layers import forget, move
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled, copy_cache
from sparsekv_pl.models.layer_kinds import attentions, evicted_layers
from sparsekv_pl.presses.pressed_model import applied
from sparsekv_pl.presses.shadowed_method import shadowed
from sparsekv_pl.presses.traits import PressTraits, traits_of


@dataclass
class _Call:
    """The arguments of one attention layer's forward hook."""

    module: nn.Module
    kwargs: dict[str, Any]
    output: Any


class RecordedPrefill:
    """A dense prefill of a context (B, L), to which presses can be applied one after the other.

    Parameters
    ----------
    model, context_ids
        The causal LM, and the context's token ids (B, L).
    """

    def __init__(self, model: PreTrainedModel, context_ids: Tensor) -> None:
        self.model = model
        self.context_ids = context_ids
        self.calls: list[_Call] = []
        self._scores: dict[tuple[int, int], tuple[ScorerPress, Tensor]] = {}
        found = attentions(model)
        self.layers = evicted_layers(model.config)
        hooks = [found[layer].register_forward_hook(self._record, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                self.cache = prefill(model, context_ids, None).cache
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, module: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append(_Call(module, kwargs, output))

    @torch.no_grad()
    def evicted(self, press: BasePress | None) -> Prefilled:
        """Return the context's cache after ``press``, equal to a prefill under that press. None keeps everything.

        A press that runs the model itself (KVzipPress) cannot be replayed and gets its own prefill.
        """
        traits = None if press is None else traits_of(press)
        if traits is not None and not traits.replayable:
            return prefill(self.model, self.context_ids, press)
        cache = copy_cache(self.cache)
        for call in self.calls:
            call.module.masked_key_indices = None  # type: ignore[assignment]  # left by a head-wise press before this one
        position = self.context_ids.shape[1]
        if press is not None and traits is not None:
            check_weights(self.model, traits)
            check_window(self.model, position + 1)  # a token follows
            check_rows(traits, len(self.context_ids))
            with applied(self.model, traits, self._scored_once(traits)):
                for call in self.calls:
                    kwargs = {**call.kwargs, "past_key_values": cache}
                    press.forward_hook(call.module, [], kwargs, call.output)
            if traits.re_rotates:
                whole, position = position, cache.get_seq_length(self.layers[0])
                dropped = forget(self.model, cache, whole, self.layers)
                move(self.model, cache, position, position - whole, dropped, None)
        return Prefilled(cache, position, [])

    @contextmanager
    def _scored_once(self, traits: PressTraits) -> Iterator[None]:
        scorers: dict[int, Any] = {id(part.press): part.press for part in traits.parts if part.same_at_every_ratio}
        with ExitStack() as stack:
            for scorer in scorers.values():
                stack.enter_context(shadowed(scorer, "score", partial(self._score, scorer)))
            yield

    def _score(
        self,
        scorer: ScorerPress,
        score: Callable[..., Tensor],
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        whole = self.cache.layers[layer].keys
        assert whole is not None
        if keys.shape != whole.shape:  # BlockPress and similar presses pass parts of the keys
            return score(module, hidden_states, keys, *args, **kwargs)
        key = (id(scorer), layer)
        if key not in self._scores:  # the scorer is kept too: a freed one's id could be reused
            self._scores[key] = scorer, score(module, hidden_states, keys, *args, **kwargs)
        return self._scores[key][1].clone()  # wrappers write into it
