"""PagePress: keep or evict whole pages of the context, by the mean of another press's scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import KeyDiffPress, ScorerPress
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.presses.caught_scores import standardised
from sparsekv_pl.presses.inner_scorer import check_inner_scorer, inner_scores
from sparsekv_pl.presses.position_order import InOrderPress
from sparsekv_pl.presses.press_context import key_positions, press_context_in

TIES = 1e-5
"""What a token's score is below the one before it in its page, in deviations of the scores: the page's first stay."""


@dataclass
class PagePress(InOrderPress):
    """Keep the pages of ``page_tokens`` consecutive tokens whose keys ``press`` scores highest on average.

    A fact is read from tokens that stand together, and one key that stays without its neighbours helps little. Page n
    holds the context's tokens from n * page_tokens on, over any number of chunks and evictions, and its mean is that of
    its keys which are still there. Exactly the budget stays, so one page of a head may stay in part.

    With ``shared``, all KV heads of a layer keep the same pages, by the mean of their standardised scores: whole blocks
    of memory become free, as an engine with paged memory needs it. kvpress's ChunkKVPress selects
    alike, but cuts the remaining keys into new chunks after every eviction, and keeps what a batch's first row selects.

    Keys that ``press`` keeps by a rule of infinite scores stay. Gradients flow through all scores. While decoding the
    positions are unknown, so it does not evict there.

    Parameters
    ----------
    compression_ratio
        Fraction of all KV pairs that is removed, to below 1.
    press
        Scores single keys. Its own compression_ratio must stay 0.
    page_tokens
        Tokens of a page; vLLM's pages have 16.
    shared
        Whether all heads of a layer keep the same pages; else each head chooses its own.
    sinks
        First tokens of the context that always stay.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    compression_ratio: float = 0.0
    press: ScorerPress = field(default_factory=KeyDiffPress)
    page_tokens: int = 16
    shared: bool = True
    sinks: int = 4

    def __post_init__(self) -> None:
        check_compression_ratio("PagePress.compression_ratio", self.compression_ratio)
        check_inner_scorer("PagePress", self.press)
        for name, least in (("page_tokens", 1), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"PagePress.{name} is {getattr(self, name)}: give at least {least}")

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Prepare the press inside."""
        self.press.post_init_from_model(model)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Return the standardised mean of each key's page, (B, K, S) float32; one highest value for the sinks."""
        inputs = hidden_states, keys, values, attentions, kwargs
        scores = inner_scores(self.press, self.compression_ratio, module, *inputs)
        context, free = press_context_in(kwargs), scores.isfinite()
        read = keys.shape[2] if context is None else context.start + hidden_states.shape[1]
        positions = key_positions(module, keys, read, kwargs)
        pages, place = positions // self.page_tokens, positions % self.page_tokens
        means = self._means(standardised(scores, free), free, pages, -(-read // self.page_tokens))
        return torch.where(free, means - TIES * place, scores).masked_fill(positions < self.sinks, torch.inf)

    def _means(self, scores: Tensor, free: Tensor, pages: Tensor, count: int) -> Tensor:
        """Return the mean (B, K, S) of the ``free`` scores in each key's page, one of ``count``."""
        shape = scores.shape
        if self.shared:  # one row of all heads' keys
            scores, free, pages = (each.flatten(1)[:, None] for each in (scores, free, pages))
        zeros = scores.new_zeros(*scores.shape[:2], count)
        total = zeros.scatter_add(-1, pages, torch.where(free, scores, 0))
        number = zeros.scatter_add(-1, pages, free.to(scores))
        return (total / number.clamp(min=1)).gather(-1, pages).view(shape)
