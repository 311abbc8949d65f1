"""AnchorPress: keep the anchors and let a cheap scorer choose the rest."""

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
from sparsekv_pl.presses.inner_scorer import check_inner_scorer, inner_scores
from sparsekv_pl.presses.key_tokens import ReadsTokens, key_tokens, real_keys
from sparsekv_pl.presses.model_tokenizer import tokenizer_of
from sparsekv_pl.presses.position_order import InOrderPress

NOTHING_KNOWN = AnchorTable(torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))
"""A table in which the only token, id 0, is neither special nor punctuation."""


@dataclass
class AnchorPress(ReadsTokens, InOrderPress):
    """Keep the anchors and fill the rest of the budget by the scores of ``press``, in training and evaluation.

    SparseKV's rule at inference. Sinks and recent tokens are from StreamingLLM (arXiv 2309.17453), special tokens and
    punctuation from SepLLM (arXiv 2412.12094), the default scorer is KeyDiff (arXiv 2504.15364). The only cost besides
    the scorer is a lookup of token ids. Exactly the budget stays. If a row has more anchors than that, sinks come
    first, then recent tokens, special tokens and punctuation, the newest of each kind first; then the keys that the
    scorer itself keeps by rule (SnapKV's window).

    If the keys' tokens are unknown, only the first and last keys passed to the press are anchors. This is the case in
    decoding, for each part that ChunkPress and BlockPress cut, and after another press in a ComposedPress: put this one
    first.

    Gradients flow through the scores of all keys that are no anchors. Padding is no anchor and is evicted first; the
    scorer gets keys of 0 for it, which KeyDiff and Knorm ignore. In kvpress's other scorers, padding affects scores.

    Parameters
    ----------
    compression_ratio
        Fraction of all KV pairs that is removed, anchors included.
    press
        Scores the keys that are no anchors. Its own compression_ratio must stay 0: it scores at this press's ratio.
    anchors
        Which tokens are anchors.

    Attributes
    ----------
    tokenizer
        Identifies special tokens and punctuation; None takes the one beside the model's weights.

    Raises
    ------
    ValueError
        For bad settings, and if special tokens or punctuation are anchors and there is no tokenizer.
    """

    compression_ratio: float = 0.0
    press: ScorerPress = field(default_factory=KeyDiffPress)
    anchors: Anchors = field(default_factory=Anchors)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, init=False, repr=False, compare=False)
    _table: AnchorTable | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_compression_ratio("AnchorPress.compression_ratio", self.compression_ratio)
        check_inner_scorer("AnchorPress", self.press, ", which counts the anchors too")
        if not isinstance(self.anchors, Anchors):
            raise ValueError(f"AnchorPress.anchors is {self.anchors!r}: give Anchors(sinks=4, recent=64, ...)")

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Make token ids available to this press, and build the table of special tokens and punctuation."""
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
        """Return scores (B, K, S) float32: one highest value for all anchors, the inner scores, then padding."""
        real = real_keys(keys, kwargs)
        shown = keys if real is None else keys.masked_fill(~real[:, None, :, None], 0)
        inputs = hidden_states, shown, values, attentions, kwargs
        inner = inner_scores(self.press, self.compression_ratio, module, *inputs)
        by_rule = pinned(inner)
        if real is not None:
            by_rule = by_rule & real[:, None]
        # Scores of keys kept by rule have no meaning: such a key either becomes an anchor below or scores 0.
        scores = inner.masked_fill(by_rule, 0)
        wanted = self._priority(module, keys, real, kwargs)
        newest = torch.arange(1, keys.shape[2] + 1, device=keys.device)
        wanted = torch.where(by_rule & (wanted == 0), newest, wanted)
        first = wanted.topk(compute_n_kept(keys.shape[2], self.compression_ratio), dim=-1)
        stays = torch.zeros_like(by_rule).scatter(-1, first.indices, first.values > 0)
        highest, lowest = scores.detach().amax(), scores.detach().amin()
        # + 1 alone could be rounded away next to a large float32.
        scores = torch.where(stays, 1 + highest + highest.abs(), scores)
        return scores if real is None else torch.where(real[:, None], scores, lowest - 1 - lowest.abs())

    def _priority(self, module: nn.Module, keys: Tensor, real: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor:
        """Return each key's priority as an anchor, (B, K, S) or (B, 1, S) int64, see ``priority``."""
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
    """Return each token's priority as an anchor, (B, L) int64: 0 for no anchor, else higher is kept first.

    ``ids`` are (B, L); ``real`` (B, L) is False for padding. Anchors' priorities are distinct and above L.
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
