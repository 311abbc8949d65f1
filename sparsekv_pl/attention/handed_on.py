"""Keywords of a decoder's forward reach its attention layers, also if the decoder drops them."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import attentions

DROP = ("FalconH1Model", "BambaModel")
"""Classes of decoders that give their layers no keywords but their own (transformers 5.2)."""


@contextmanager
def handed_on(model: PreTrainedModel) -> Iterator[None]:
    """Give every attention layer the keywords that ``model``'s decoder gets inside the block and does not know."""
    decoder, given = decoder_of(model), dict[str, Any]()
    if type(decoder).__name__ not in DROP:
        yield
        return
    own = set(inspect.signature(type(decoder).forward).parameters)

    def keep(_: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        given.clear()
        given.update(
            {name: value for name, value in kwargs.items() if name not in own and not isinstance(value, Cache)}
        )

    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, given | kwargs

    with ExitStack() as stack:
        stack.callback(decoder.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for attention in attentions(model).values():
            stack.callback(attention.register_forward_pre_hook(add, with_kwargs=True, prepend=True).remove)
        yield
