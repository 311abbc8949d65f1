"""A token's attention to blocks of the context, by layer and head, from one row of the attention matrix."""

import torch
from torch import Tensor

from sparsekv_pl.attention.online_softmax import block_sums
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.models.softmax_rule import PLAIN, KnowsRules, SoftmaxRule


class HotBlocks(KnowsRules):
    """An ``Observer`` (evicted_attention.py) that sums the last token's attention over blocks of the context.

    Pass it as ``observer=`` to a forward that runs with our attention, for instance
    ``continue_from(model, ids, DynamicCache(), 0, observer=hot)``; ``hot.mass`` then holds all layers. In a prefill of
    several chunks, observe only the last one. Each pass needs a new observer.

    The context is the first ``context_tokens`` keys, in blocks of ``block_size`` from key 0 on; the last may be
    shorter. Keys after it (the question, the token itself) are in no block.
    """

    def __init__(self, context_tokens: int, block_size: int = 512) -> None:
        self.context_tokens, self.block_size = context_tokens, block_size
        self.layers: dict[int, Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: SoftmaxRule = PLAIN) -> None:  # noqa: ARG002
        """Measure one layer: the last query of (B, H, T, D) over the keys (B, K, S, D).

        Raises ``ValueError`` if this layer was measured before, or there are fewer keys than the context has tokens.
        """
        if layer in self.layers:
            raise ValueError(f"layer {layer} was measured already: use a new HotBlocks for every pass")
        self.layers[layer] = block_mass(query[:, :, -1], key, self.context_tokens, self.block_size, rule)

    @property
    def mass(self) -> Tensor:
        """(B, layers, H, N) float32 on the CPU: the share of a head's attention on each of N blocks."""
        return stacked([self.layers[layer] for layer in sorted(self.layers)], dim=1).cpu()


@torch.no_grad()
def block_mass(query: Tensor, key: Tensor, context_tokens: int, block_size: int, rule: SoftmaxRule = PLAIN) -> Tensor:
    """Sum softmax(query key^T / sqrt(D)) under ``rule`` over all S keys by block of the context: (B, H, N) float32.

    ``query`` (B, H, D) is the newest token's; ``key`` is (B, K, S, D), H a multiple of K. N blocks of ``block_size``
    keys cover the first ``context_tokens`` keys. Raises ``ValueError`` if there are fewer keys than that.
    """
    (batch, heads, dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    if keys < context_tokens:
        raise ValueError(f"there are {keys} keys but the context has {context_tokens} tokens: nothing may be evicted")
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the products to 16 bits
        grouped = query.float().view(batch, kv_heads, -1, dim) * dim**-0.5
        logits = rule.logits((grouped @ key.float().transpose(2, 3)).view(batch, heads, 1, keys))
    return block_sums(rule.weights(logits)[:, :, 0, :context_tokens], block_size)
