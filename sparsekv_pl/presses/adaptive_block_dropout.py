"""AdaptiveBlockDropoutPress: drop blocks in training, those with little attention first."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.span_dropout import Shown
from sparsekv_pl.presses.window_attention import window_attention


@dataclass
class AdaptiveBlockDropoutPress(BlockDropoutPress):
    """Drop random blocks in training; blocks with little attention from the last queries are dropped more often.

    A block's density is the attention per token that it receives from an observation window; its importance is the
    density without sink attention:

        importance = density * (1 - sink attention / attention) = (attention - sink attention) / length

    Blocks are kept in the order of log(importance) + temperature * Gumbel noise: at temperature 1 they are drawn
    without replacement with odds proportional to their importance (Kool et al., arXiv 1903.06059). Each KV head uses
    the mean over its query heads; no gradient flows through the choice. See ``BlockDropoutPress`` and
    ``SpanDropoutPress`` for the parameters not listed here.

    Parameters
    ----------
    window_size
        Number of last queries in the observation window. Not all of them see all keys inside the window, so
        ``protect_recent`` should not be smaller.
    sink_tokens
        All attention to the first ``sink_tokens`` tokens is sink attention. For other keys, sink attention is the part
        that does not depend on the query: see ``sink_attention``.
    temperature
        0 always drops the least important blocks; infinity drops uniformly at random.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    window_size: int = 32
    sink_tokens: int = 4
    temperature: float = 1.0
    shared: bool = field(default=False, init=False)  # attention differs between layers

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least("window_size", 1)
        self.check_at_least("sink_tokens", 0)
        self.check_at_least("temperature", 0, whole=False)

    def priority(self, shown: Shown, spans: Tensor) -> Tensor:
        """Return the noisy log-importance (B, K, N) of the blocks."""
        tokens = shown.kwargs["position_embeddings"][0].shape[1]  # in decoding, only the newest tokens have embeddings
        states = shown.hidden_states[:, -tokens:]
        attention = window_attention(shown.module, states, shown.keys, shown.kwargs, self.window_size)
        importance = self.importance(attention, shown.keys.shape[1], spans, shown.place, self.most_spans(shown))
        tiny = torch.finfo(torch.float32).tiny
        noise = -(-self.uniform(shown, importance.shape[-1]).clamp(min=tiny).log()).log()
        # At infinity the noise alone decides; the sum would be infinite everywhere.
        return noise if math.isinf(self.temperature) else importance.clamp(min=tiny).log() + self.temperature * noise

    def importance(self, attention: Tensor, heads: int, spans: Tensor, place: Tensor, count: int) -> Tensor:
        """Return the importance (B, K, N) float32 of spans, from attention (B, H, W, S).

        ``spans`` (B, 1, S) numbers each key's span, ``place`` (B, S) each real key of a row. K is ``heads``, the number
        of KV heads; N is ``count``, at least the number of spans.
        """
        received = attention.mean(2).unflatten(1, (heads, -1)).mean(2)
        sink = received.minimum(sink_attention(attention)[:, None])
        content = (received - sink).masked_fill(place[:, None] < self.sink_tokens, 0.0)
        blocks = spans.expand_as(content)
        empty = content.new_zeros(*content.shape[:2], count)
        length = empty.scatter_add(-1, blocks, (place >= 0).to(content)[:, None].expand_as(content))
        return empty.scatter_add(-1, blocks, content) / length.clamp(min=1)


def sink_attention(attention: Tensor) -> Tensor:
    """Return the part (B, S) of the attention (B, H, W, S) to each key that does not depend on the query.

    It is the median over a layer's heads and queries; rows of zeros are no queries and are left out. The median is near
    the mean for an attention sink (Xiao et al., arXiv 2309.17453), and near 0 for a key that a few heads or queries
    attend to.
    """
    queries = attention.flatten(1, 2)
    real = queries.sum(-1, keepdim=True) > 0
    return queries.masked_fill(~real, torch.nan).nanmedian(dim=1).values.nan_to_num()
