"""What follows an eviction, token by token: greedy answers, and text read while a press evicts during decoding."""

from collections.abc import Collection, Sequence

import torch
from kvpress import BasePress, DecodingPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.answering import Answering, Enough
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.traits import traits_of


def greedy(
    model: PreTrainedModel,
    prefilled: Prefilled,
    questions: Tensor,
    lengths: Tensor,
    most: Sequence[int],
    stop_ids: Collection[int] = (),
    enough: Enough | None = None,
) -> list[list[int]]:
    """The most likely answers after one cache: see ``Answering`` and ``greedy_together``."""
    answering = Answering(model, prefilled, questions, lengths, most)
    greedy_together(model, [answering], stop_ids, enough)
    return answering.answers


@torch.no_grad()
def greedy_together(
    model: PreTrainedModel, asked: Sequence[Answering], stop_ids: Collection[int] = (), enough: Enough | None = None
) -> None:
    """Let all rows of ``asked`` answer, greedily and without the stop token, into their ``answers``.

    A token of every row that goes on is one forward: products are of all rows, attention of each cache's by itself. A
    row gets what it would get alone.
    """
    head = model.get_output_embeddings().weight.float()  # bfloat16 logits tie, and a tie is no verdict
    last, going = torch.cat([one.last for one in asked]), list(asked)
    while going:
        with torch.autocast(last.device.type, enabled=False):
            newest = (last.float() @ head.T).argmax(-1)
        said, stay, start = newest.tolist(), [], 0
        for one in going:
            rows = len(one)
            stay += [start + place for place in one.hear(said[start : start + rows], stop_ids, enough)]
            start += rows
        going = [one for one in going if len(one)]
        if len(stay) < len(said):
            newest = torch.tensor([said[place] for place in stay], device=newest.device)
        if going:
            positions = torch.cat([one.go_on() for one in going])
            last = continue_from(model, newest[:, None], DynamicCache(), positions, decoding=True, caches=going)[:, 0]


@torch.no_grad()
def read_while_evicting(
    model: PreTrainedModel,
    prefilled: Prefilled,
    continuation_ids: Tensor,
    press: BasePress,
    budget: int,
    interval: int,
) -> Tensor:
    """Hidden states (B, T, E) of a continuation (B, T) read one token at a time, as it would be generated.

    Every ``interval`` tokens ``press`` shrinks each layer's cache to ``budget`` pairs a head (kvpress's DecodingPress).

    Raises
    ------
    ValueError
        For a press that is no scorer or looks at a window longer than ``interval``, and for a budget below 1.
    """
    traits = traits_of(press)
    if not traits.evicts_while_decoding or traits.window > interval or budget < 1:
        raise ValueError(
            f"{traits.name} cannot evict every {interval} tokens down to {budget} during decoding: it must be a "
            f"scorer, its window ({traits.window} tokens) at most the interval, and the budget at least 1"
        )
    set_compression_ratio(press, 0.0)  # DecodingPress sets its own
    evicting = DecodingPress(press, compression_interval=interval, target_size=budget)
    hidden = []
    with evicting(model):
        for step in range(continuation_ids.shape[1]):
            token, position = continuation_ids[:, step : step + 1], prefilled.next_position + step
            hidden.append(continue_from(model, token, prefilled.cache, position, decoding=True))
    return torch.cat(hidden, dim=1)
