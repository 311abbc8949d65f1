"""AdaptiveBlockDropoutPress: drop blocks in training, sooner the less attention they receive."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.span_dropout import Shown
from sparsekv_pl.presses.window_attention import window_attention


@dataclass
class AdaptiveBlockDropoutPress(BlockDropoutPress):
    """Drop random blocks in training, those first that the last queries hardly read.

    A block's density is the attention that it receives from an observation window, per token; its importance is what
    is left of it without sink attention:

        importance = density * (1 - sink attention / attention) = (attention - sink attention) / length

    Blocks stay in the order of log(importance) + temperature * Gumbel noise: at temperature 1 they are drawn without
    replacement with odds proportional to their importance (Kool et al., arXiv 1903.06059). Each KV head counts the mean
    over its query heads; nothing flows back through the choice. See ``BlockDropoutPress`` and ``SpanDropoutPress`` for
    the parameters not listed here.

    Parameters
    ----------
    window_size
        Queries in the observation window: the last ones. Of its own keys not all queries see all, so ``protect_recent``
        should be no smaller.
    sink_tokens
        All attention to the first ``sink_tokens`` tokens is sink attention. Of any other key it is what most heads of
        the layer pay at most queries of the window, whatever is asked: see ``sink_attention``.
    temperature
        0 always drops the least important blocks, infinity any.
    """

    window_size: int = 32
    sink_tokens: int = 4
    temperature: float = 1.0
    shared: bool = field(default=False, init=False)  # every layer reads something else

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least("window_size", 1)
        self.check_at_least("sink_tokens", 0)
        self.check_at_least("temperature", 0, whole=False)

    def priority(self, shown: Shown, spans: Tensor) -> Tensor:
        """(B, K, N): the noisy log-importance of the blocks."""
        tokens = shown.kwargs["position_embeddings"][0].shape[1]  # while tokens are decoded, older ones come without
        states = shown.hidden_states[:, -tokens:]
        attention = window_attention(shown.module, states, shown.keys, shown.kwargs, self.window_size)
        importance = self.importance(attention, shown.keys.shape[1], spans, shown.place, self.most_spans(shown))
        tiny = torch.finfo(torch.float32).tiny
        noise = -(-self.uniform(shown, importance.shape[-1]).clamp(min=tiny).log()).log()
        # At infinity the noise decides alone; the sum would be infinite everywhere.
        return noise if math.isinf(self.temperature) else importance.clamp(min=tiny).log() + self.temperature * noise

    def importance(self, attention: Tensor, heads: int, spans: Tensor, place: Tensor, count: int) -> Tensor:
        """(B, K, N) float32 of attention (B, H, W, S), spans (B, 1, S) and places (B, S).

        K is ``heads``, the KV heads, and N is ``count``, at least the spans that there are.
        """
        received = attention.mean(2).unflatten(1, (heads, -1)).mean(2)
        sink = received.minimum(sink_attention(attention)[:, None])
        content = (received - sink).masked_fill(place[:, None] < self.sink_tokens, 0.0)
        blocks = spans.expand_as(content)
        empty = content.new_zeros(*content.shape[:2], count)
        length = empty.scatter_add(-1, blocks, (place >= 0).to(content)[:, None].expand_as(content))
        return empty.scatter_add(-1, blocks, content) / length.clamp(min=1)


def sink_attention(attention: Tensor) -> Tensor:
    """(B, S): of the attention (B, H, W, S) to each key, what does not depend on who asks.

    It is the median over a layer's heads and queries, but for rows of 0, which are no queries. The median is near the
    mean for a token that draws attention by being itself (Xiao et al., arXiv 2309.17453), and near 0 for one that a few
    heads or queries read.
    """
    queries = attention.flatten(1, 2)
    real = queries.sum(-1, keepdim=True) > 0
    return queries.masked_fill(~real, torch.nan).nanmedian(dim=1).values.nan_to_num()
