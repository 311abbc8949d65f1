"""Scorers that leave the cache in the order of its positions."""

from collections.abc import Mapping
from typing import Any

from kvpress import ScorerPress
from kvpress.utils import compute_n_kept
from torch import Tensor, nn


class InOrderPress(ScorerPress):
    """A ScorerPress after which the first and the last keys of the cache are still those of the first and last tokens.

    kvpress's own leave keys in the order of their scores. A press that protects sinks or recent tokens by where they
    stand would protect others the next time it is called: while tokens are decoded, and in a ComposedPress, where it
    must therefore not stand behind a press of kvpress's.
    """

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The keys and values (B, K, S, D) that score highest. See ``ScorerPress.compress``."""
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = scores.topk(compute_n_kept(keys.shape[2], self.compression_ratio), dim=-1).indices.sort(dim=-1).values
        index = kept[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)
