"""transformers' own ``generate`` after an evicted cache, at true positions and with padded batches.

``generate`` takes positions and lengths from the cache, which an evicted one does not tell: its next token has a later
position than its length, and layers may keep different numbers of pairs. So positions are given, and attention is the
one that evaluation uses, in which a question's padding is hidden row by row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv_pl.attention.evicted_attention import CACHED, attention_implementation
from sparsekv_pl.eviction.limits import check_continuation
from sparsekv_pl.eviction.other_layers import check_next_tokens
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import linear_layers
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel

NEW_TOKENS = 64
"""Most tokens of an answer, if nothing is said."""
OURS = ("past_key_values", "position_ids", "cache_position", "attention_mask", "inputs_embeds", "input_ids")
"""Arguments that follow from the cache and the questions."""
MULTIPLIERS = ("num_beams", "num_return_sequences")
"""Settings by which ``generate`` multiplies rows; the larger counts."""
REFUSED = {
    "use_cache": (False, "the cache is what is asked"),
    "cache_implementation": (None, "the kept cache is used"),
    "assistant_model": (None, "a draft is rolled back by the cache's length, which is not that of the text"),
    "prompt_lookup_num_tokens": (None, "a draft is rolled back by the cache's length, which is not that of the text"),
    "assistant_early_exit": (None, "a draft is rolled back by the cache's length, which is not that of the text"),
    "prefill_chunk_size": (None, "it counts positions from 0; questions are short"),
    "token_healing": (True, "it changes the questions"),
}
"""Setting -> a refused value (None: any) and the reason."""


def padded_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token ids on the left, as ``generate`` wants them; return ids and attention mask, (B, T) int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def generate(model: LoadedModel, kept: KeptContext, rows: Sequence[Sequence[int]], settings: dict[str, Any]) -> Any:
    """Continue each of ``rows``, token ids that follow the context, by ``model.generate``; return its result.

    Answers end at the model's ``stop_ids``, as greedy ones do, unless ``settings`` say otherwise.

    Raises
    ------
    ValueError
        For a setting that cannot be met, and if the answers would end beyond the model's positions.
    """
    config = settings.get("generation_config") or model.model.generation_config
    if linear_layers(model.model):
        raise ValueError(
            f"generate: {type(model.model).__name__} has layers without attention, whose state transformers continues "
            "by its own cache alone: use ask"
        )
    _check(settings, config)
    if not any(settings.get(name) for name in ("max_new_tokens", "max_length", "generation_config")):
        settings = settings | {"max_new_tokens": NEW_TOKENS}
    if model.stop_ids and not settings.get("generation_config"):
        settings = {"eos_token_id": sorted(model.stop_ids)} | settings
    pad = model.tokenizer.pad_token_id
    ids, mask = padded_left(rows, pad, model.device)
    longest = _most_tokens(settings, config, ids.shape[1])
    check_continuation(model.model, kept.next_position, longest)
    check_next_tokens(model.model, kept.prefilled(1).cache, kept.next_position, longest)
    copies = max(int(settings.get(name) or getattr(config, name, None) or 1) for name in MULTIPLIERS)
    with model.computing(), _hiding_padding(model, mask):
        return model.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            position_ids=kept.next_position + (mask.cumsum(1) - 1).clamp(min=0),
            cache_position=torch.arange(ids.shape[1], device=ids.device),
            past_key_values=kept.prefilled(len(rows) * copies).cache,
            **{"pad_token_id": pad, "tokenizer": model.tokenizer} | settings,
        )


def _check(settings: dict[str, Any], config: Any) -> None:
    for name in OURS:
        if name in settings:
            raise ValueError(f"generate: {name} follows from the cache and the questions: leave it out")
    for name, (wrong, why) in REFUSED.items():
        for value in (settings.get(name), getattr(config, name, None)):
            if value is not None and (value is wrong or wrong is None):
                raise ValueError(f"generate: {name}={value!r} does not go with a kept cache, as {why}: leave it out")


def _most_tokens(settings: dict[str, Any], config: Any, asked: int) -> int:
    """Return the most tokens of a question of ``asked`` tokens and its answer, without the last one."""
    new = settings.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
    length = settings.get("max_length") or getattr(config, "max_length", None)
    return asked + int(new) - 1 if new else max(int(length or asked), asked)


@contextmanager
def _hiding_padding(model: LoadedModel, mask: Tensor) -> Iterator[None]:
    """Use the evicted cache's attention in the block; it takes the padding of the newest tokens row by row."""
    padded = not bool(mask.all())

    def pass_on(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        visible = kwargs.pop("attention_mask", None)
        return args, kwargs | ({"newest_visible": visible.bool()} if padded and visible is not None else {})

    hook = decoder_of(model.model).register_forward_pre_hook(pass_on, with_kwargs=True)
    try:
        with attention_implementation(model.model, CACHED):
            yield
    finally:
        hook.remove()
