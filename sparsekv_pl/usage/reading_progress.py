"""Progress of a prefill, layer by layer, so that one long chunk moves a bar too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of

Report = Callable[[int, int], object]
"""Takes the number of tokens read so far, and of all tokens."""


@contextmanager
def reported(model: PreTrainedModel, report: Report | None, start: int, stop: int, tokens: int) -> Iterator[None]:
    """Call ``report`` after the layers of a forward over [start, stop) of ``tokens``, as if each read its share."""
    if report is None:
        yield
        return
    layers = decoder_of(model).layers

    def passed(number: int, *_: Any) -> None:
        reached = start + (stop - start) * number // len(layers)
        if reached > start:
            report(reached, tokens)

    hooks = [layer.register_forward_hook(partial(passed, number)) for number, layer in enumerate(layers, 1)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
