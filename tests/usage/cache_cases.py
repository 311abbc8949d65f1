"""Documents, presses, and the slow way to an answer: a prefill under the press, then one token at a time."""

import torch
from kvpress import BasePress, KeyRerotationPress, KnormPress, PyramidKVPress, SnapKVPress
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel

DOCUMENT = "Rivers carry sand to the sea, and the sea carries it along the coast. " * 4
MORE = "In winter the wind brings it back, and dunes grow behind the beach."
QUESTIONS = ["Who carries sand?", "Where do dunes grow in winter, and why do they?", "What?"]
NEW = 6

PRESSES: list[BasePress | None] = [
    None,
    KnormPress(0.5),
    SnapKVPress(0.5, window_size=4),
    KeyRerotationPress(KnormPress(0.5)),
]
UNEVEN = PyramidKVPress(0.5, window_size=4)
"""Keeps another number of pairs in each layer."""


def document_ids(model: LoadedModel, document: str = DOCUMENT) -> Tensor:
    """A document in its frame, (1, L)."""
    return torch.tensor([[*model.prefix_ids, *model.encoder.encode(document)]])


@torch.no_grad()
def slowly(model: LoadedModel, press: BasePress | None, question: list[int], new: int = NEW) -> list[int]:
    """Answer as kvpress does, with transformers' stock attention; the first token that ends a text is left out."""
    cache, context, network = DynamicCache(), document_ids(model), model.model
    if press is None:
        network.model(context, past_key_values=cache)
    else:
        with press(network):
            network.model(context, past_key_values=cache)
    start = cache.get_seq_length() if isinstance(press, KeyRerotationPress) else context.shape[1]
    answer: list[int] = []
    for step in range(len(question) + new - 1):
        token = question[step] if step < len(question) else answer[-1]
        places = torch.tensor([[start + step]])
        logits = network(torch.tensor([[token]]), past_key_values=cache, position_ids=places).logits
        if step >= len(question) - 1:
            answer.append(int(logits[0, -1].argmax()))
    ends = [place for place, token in enumerate(answer) if token in model.stop_ids]
    return answer[: ends[0]] if ends else answer


def bits(cache: ContextCache) -> dict[str, bytes]:
    """A cache's tensors as bytes, by name."""
    return {name: one.contiguous().view(torch.uint8).numpy().tobytes() for name, one in cache.kept.tensors.items()}
