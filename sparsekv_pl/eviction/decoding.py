"""Decoding after an eviction: greedy answers, and text read token by token while a press evicts."""

from collections.abc import Collection, Sequence

import torch
from kvpress import BasePress, DecodingPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.answering import Answering, Enough
from sparsekv_pl.eviction.other_layers import forget
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.models.head import head_of
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.presses.cache_keyword import renamed
from sparsekv_pl.presses.pressed_model import pressed
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.shadowed_method import shadowed
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


@torch.no_grad()
def read_while_evicting(
    model: PreTrainedModel,
    prefilled: Prefilled,
    continuation_ids: Tensor,
    press: BasePress,
    budget: int,
    interval: int,
) -> Tensor:
    """Read a continuation (B, T) one token at a time, as in generation; return its hidden states (B, T, E).

    Every ``interval`` tokens ``press`` shrinks each layer's cache to ``budget`` pairs per head (kvpress's
    DecodingPress).

    Raises
    ------
    ValueError
        If the press is no scorer, if its window is longer than ``interval``, or if ``budget`` is below 1.
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
    with shadowed(evicting, "forward_hook", renamed), evicting(pressed(model)):
        for step in range(continuation_ids.shape[1]):
            token, position = continuation_ids[:, step : step + 1], prefilled.next_position + step
            hidden.append(continue_from(model, token, prefilled.cache, position, decoding=True))
    end = prefilled.next_position + continuation_ids.shape[1]
    forget(model, prefilled.cache, end, evicted_layers(model.config))
    return torch.cat(hidden, dim=1)
