"""AnchorPress: the anchors stay, and a cheap scorer chooses the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from kvpress import KeyDiffPress, ScorerPress
from kvpress.utils import compute_n_kept
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.models.anchors import Anchors, AnchorTable, table_for
from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.presses.caught_scores import pinned
from sparsekv_pl.presses.key_tokens import ReadsTokens, key_tokens, real_keys
from sparsekv_pl.presses.model_tokenizer import tokenizer_of
from sparsekv_pl.presses.position_order import InOrderPress
from sparsekv_pl.presses.ratio import at_ratios

NOTHING_KNOWN = AnchorTable(torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))
"""The table under which an unknown token, id 0, is neither special nor punctuation."""


@dataclass
class AnchorPress(ReadsTokens, InOrderPress):
    """Keep the anchors and fill the rest of the budget with what ``press`` scores highest, in training and evaluation.

    SparseKV's rule at inference. Sinks and recent tokens are from StreamingLLM (arXiv 2309.17453), special tokens and
    punctuation from SepLLM (arXiv 2412.12094), the default scorer is KeyDiff (arXiv 2504.15364). Besides the scorer it
    costs a look at the token ids. Exactly the budget stays: where a row has more anchors than that, sinks come first,
    then recent tokens, then special ones, then punctuation, the newest of each first; then what the scorer itself
    keeps by rule (SnapKV's window).

    Where the tokens of the keys are not known, anchors are so by place alone: the first and the last keys that the
    press is shown. That is so while tokens are decoded, for each part that ChunkPress and BlockPress cut, and behind
    another press in a ComposedPress: put this one first.

    Gradients flow through the scores of all that is no anchor. Padding is no anchor and goes first; the scorer sees it
    as keys of 0, which KeyDiff and Knorm pass over. Other scorers of kvpress's let padding blur their scores.

    Parameters
    ----------
    compression_ratio
        Of the whole budget, anchors included.
    press
        Scores what is no anchor. Its own compression_ratio stays 0: it scores at this press's.
    anchors
        Which tokens are anchors.

    Attributes
    ----------
    tokenizer
        Tells special tokens and punctuation; None takes the one beside the model's weights.

    Raises
    ------
    ValueError
        For bad settings, and where special tokens or punctuation are asked for without a tokenizer.
    """

    compression_ratio: float = 0.0
    press: ScorerPress = field(default_factory=KeyDiffPress)
    anchors: Anchors = field(default_factory=Anchors)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, init=False, repr=False, compare=False)
    _table: AnchorTable | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_compression_ratio("AnchorPress.compression_ratio", self.compression_ratio)
        if not isinstance(self.press, ScorerPress):
            raise ValueError(
                f"AnchorPress.press is {self.press!r}: give a press that scores every key, such as KeyDiffPress, and "
                "put others (AdaKVPress, ChunkPress) around AnchorPress"
            )
        if self.press.compression_ratio != 0:
            raise ValueError(
                f"AnchorPress.press has a compression_ratio of {self.press.compression_ratio}: leave it out, and set "
                "AnchorPress.compression_ratio, which counts the anchors too"
            )
        if not isinstance(self.anchors, Anchors):
            raise ValueError(f"AnchorPress.anchors is {self.anchors!r}: give Anchors(sinks=4, recent=64, ...)")

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Ask for the ids of every forward, and look up which of them are special or punctuation."""
        super().post_init_from_model(model)
        self.press.post_init_from_model(model)
        if self.anchors.special or self.anchors.punctuation:
            self._table = table_for(tokenizer_of(model, self.tokenizer), model.device)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """(B, K, S) float32: the inner scores, under one value that all anchors share, and padding under all."""
        real = real_keys(keys, kwargs)
        shown = keys if real is None else keys.masked_fill(~real[:, None, :, None], 0)
        inner = self._inner_scores(module, hidden_states, shown, values, attentions, kwargs)
        by_rule = pinned(inner)
        if real is not None:
            by_rule = by_rule & real[:, None]
        # What the scorer keeps by rule has a score of no meaning: as an anchor it gets another, or it is worth nothing.
        scores = inner.masked_fill(by_rule, 0)
        wanted = self._priority(module, keys, real, kwargs)
        newest = torch.arange(1, keys.shape[2] + 1, device=keys.device)
        wanted = torch.where(by_rule & (wanted == 0), newest, wanted)
        first = wanted.topk(compute_n_kept(keys.shape[2], self.compression_ratio), dim=-1)
        stays = torch.zeros_like(by_rule).scatter(-1, first.indices, first.values > 0)
        highest, lowest = scores.detach().amax(), scores.detach().amin()
        # Not + 1 alone, which a large float32 swallows.
        scores = torch.where(stays, 1 + highest + highest.abs(), scores)
        return scores if real is None else torch.where(real[:, None], scores, lowest - 1 - lowest.abs())

    def _inner_scores(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        """Scores (B, K, S) of the press inside, at this ratio: CriticalKVPress scores by it."""
        with at_ratios([(self.press, self.compression_ratio)]):
            scores: Tensor = self.press.score(module, hidden_states, keys, *rest)
            return scores.float()

    def _priority(self, module: nn.Module, keys: Tensor, real: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor:
        """(B, K, S) or (B, 1, S) int64: 0 for what is no anchor, else higher for what stays rather."""
        table = self._table
        if table is None and (self.anchors.special or self.anchors.punctuation):
            raise ValueError(
                "AnchorPress does not know the model's special tokens and punctuation, as the press around it never "
                "passes the model on: call its post_init_from_model(model) first, or switch both off in "
                "AnchorPress.anchors"
            )
        tokens = key_tokens(module, keys, kwargs)
        if tokens is None:
            unknown = torch.zeros(len(keys), keys.shape[2], dtype=torch.long, device=keys.device)
            return priority(self.anchors, unknown, NOTHING_KNOWN.to(keys.device), real)[:, None]
        known = NOTHING_KNOWN if table is None else table
        return tokens.at_keys(priority(self.anchors, tokens.ids, known.to(keys.device), real))


def priority(anchors: Anchors, ids: Tensor, table: AnchorTable, real: Tensor | None) -> Tensor:
    """(B, L) int64: 0 for what is no anchor of ``ids`` (B, L), else higher for what stays rather, no two the same.

    ``real`` (B, L) is False where ``ids`` are padding. The lowest anchor is above L.
    """
    none = Anchors(sinks=0, recent=0, special=False, punctuation=False)
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    kinds = [
        (replace(none, punctuation=anchors.punctuation), place),
        (replace(none, special=anchors.special), place),
        (replace(none, recent=anchors.recent), place),
        (replace(none, sinks=anchors.sinks), place.flip(0)),
    ]
    ranks = torch.zeros_like(ids)
    for level, (kind, order) in enumerate(kinds, start=1):
        ranks = torch.where(kind.mask(ids, table, real), level * (ids.shape[1] + 1) + order, ranks)
    return ranks
