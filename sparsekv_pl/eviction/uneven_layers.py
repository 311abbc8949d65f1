"""A compression ratio for each layer of a cache whose layers hold different numbers of pairs (PyramidKV)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsekv_pl.eviction.chunking import chunk_ratio
from sparsekv_pl.models.layer_kinds import attentions

if TYPE_CHECKING:
    from sparsekv_pl.eviction.prefill import ChunkedPrefill


@contextmanager
def ratio_by_layer(filling: "ChunkedPrefill", start: int, stop: int) -> Iterator[None]:
    """Before each layer's attention runs on tokens [start, stop), set the ratio that its own number of pairs asks for.

    The press keeps the last layer's ratio: the caller restores it.
    """
    deciding, ratio = filling.deciding, filling.ratio
    assert deciding is not None and ratio is not None

    def before(layer: int, _module: nn.Module, _args: Any, _kwargs: dict[str, Any]) -> None:
        held = filling.cache.get_seq_length(layer) + stop - start
        deciding.press.compression_ratio = chunk_ratio(held, stop, ratio, filling.budget)

    with ExitStack() as stack:
        found = attentions(filling.model)
        for layer in filling.layers:
            stack.callback(found[layer].register_forward_pre_hook(partial(before, layer), with_kwargs=True).remove)
        yield
