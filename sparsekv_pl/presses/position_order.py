"""A base class of scorers that keep the cache in the order of positions."""

from collections.abc import Mapping
from typing import Any

from kvpress import ScorerPress
from kvpress.utils import compute_n_kept
from torch import Tensor, nn


class InOrderPress(ScorerPress):
    """A ScorerPress that leaves the kept keys in the order of their positions.

    kvpress's ScorerPress leaves keys in the order of their scores. A press that protects sinks or recent tokens by
    their index would protect other tokens in its next call, in decoding or in a ComposedPress, where it must therefore
    not follow one of kvpress's presses.
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
        """Return the keys and values (B, K, kept, D) that score highest. See ``ScorerPress.compress``."""
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = scores.topk(compute_n_kept(keys.shape[2], self.compression_ratio), dim=-1).indices.sort(dim=-1).values
        index = kept[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)
