"""What follows an eviction, token by token: greedy answers, and text read while a press evicts during decoding."""

from collections.abc import Collection

import torch
from kvpress import BasePress, DecodingPress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled import Prefilled
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.traits import traits_of


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prefilled: Prefilled,
    continuation_ids: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """The most likely answers, a list of token ids per row, without the stop token.

    ``continuation_ids`` (B, T) are questions padded on the right to the longest, of ``lengths`` (B,) tokens each. A row
    gets what it would get alone. The answers join ``prefilled``'s cache: continue from a copy to keep it.
    """
    rows = torch.arange(len(continuation_ids), device=continuation_ids.device)
    hidden = continue_from(model, continuation_ids, prefilled.cache, prefilled.next_position)
    last = hidden[rows, lengths - 1]
    visible = torch.arange(continuation_ids.shape[1], device=lengths.device) < lengths[:, None]
    answers: list[list[int]] = [[] for _ in rows]
    open_rows = set(range(len(answers)))
    head = model.get_output_embeddings().weight.float()  # bfloat16 logits tie, and a tie is no verdict
    for step in range(max_new_tokens):
        with torch.autocast(last.device.type, enabled=False):
            newest = (last.float() @ head.T).argmax(-1)
        said = newest.tolist()
        for row in sorted(open_rows):
            if said[row] in stop_ids:
                open_rows.remove(row)
            else:
                answers[row].append(said[row])
        if not open_rows or step == max_new_tokens - 1:
            break
        visible = torch.cat([visible, visible.new_ones(len(rows), 1)], dim=1)
        position = prefilled.next_position + lengths + step
        last = continue_from(model, newest[:, None], prefilled.cache, position, decoding=True, newest_visible=visible)[
            :, 0
        ]
    return answers


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
