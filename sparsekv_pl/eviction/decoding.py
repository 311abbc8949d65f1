"""Greedy answers after an eviction."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.answering import Answering, Enough
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.models.head import head_of


def greedy(
    model: PreTrainedModel,
    prefilled: Prefilled,
    questions: Tensor,
    lengths: Tensor,
    most: Sequence[int],
    stop_ids: Collection[int] = (),
    enough: Enough | None = None,
) -> list[list[int]]:
    """Decode greedy answers after one cache; return their token ids. See ``Answering`` and ``greedy_together``."""
    answering = Answering(model, prefilled, questions, lengths, most)
    greedy_together(model, [answering], stop_ids, enough)
    return answering.answers


@torch.no_grad()
def greedy_together(
    model: PreTrainedModel, asked: Sequence[Answering], stop_ids: Collection[int] = (), enough: Enough | None = None
) -> None:
    """Decode greedily for all rows of ``asked``; their ``answers`` get the token ids, without the stop token.

    Each forward decodes one token of every unfinished row: matrix products cover all rows, attention is computed cache
    by cache. A row's answer equals the one that it would get alone.
    """
    head = head_of(model).to(torch.float32)  # bfloat16 logits can tie, and then argmax is arbitrary
    last, going = torch.cat([one.last for one in asked]), list(asked)
    while going:
        with torch.autocast(last.device.type, enabled=False):
            newest = head.logits(last.float()).argmax(-1)
        tokens, stay, start = newest.tolist(), [], 0
        for one in going:
            rows = len(one)
            stay += [start + place for place in one.append(tokens[start : start + rows], stop_ids, enough)]
            start += rows
        going = [one for one in going if len(one)]
        if len(stay) < len(tokens):
            newest = torch.tensor([tokens[place] for place in stay], device=newest.device)
        if going:
            positions = torch.cat([one.next_positions() for one in going])
            last = continue_from(model, newest[:, None], DynamicCache(), positions, decoding=True, caches=going)[:, 0]
