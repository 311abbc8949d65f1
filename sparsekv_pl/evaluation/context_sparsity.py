"""How sparse a model's attention over a batch of contexts is, layer by layer and head by head."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.attention.statistics import AttentionStatistics
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.metrics.attention_sparsity import AttentionSparsity
from sparsekv_pl.models.anchors import Anchors

LABELS = {
    "effective_support": "effective support exp(entropy), tokens",
    "top_k_coverage": "mass on the 64 heaviest keys",
    "block_sparsity": "share of 64-token blocks under 1 % of a query's mass",
    "anchor_share": "mass on anchors",
}
"""What reports call the measures of ``AttentionSparsity``, with their units."""


@torch.no_grad()
def attention_sparsity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context_ids: Tensor
) -> dict[str, list[list[float]]]:
    """Measure -> (layers, query heads), means over all queries of contexts (B, L), in one full-cache pass.

    Anchors are those that no eviction takes: sinks, special tokens, punctuation. Recent tokens are left out, as every
    query has its own.
    """
    anchors = Anchors(recent=0).mask(context_ids, tokenizer)
    statistics = AttentionStatistics(tokens=anchors)
    continue_from(model, context_ids, DynamicCache(), 0, observer=statistics)
    layers = statistics.layers
    metric = AttentionSparsity(len(layers), layers[0].entropy.shape[1]).to(context_ids.device)
    for layer, measured in layers.items():
        metric.update(layer, measured)
    return {name: values.tolist() for name, values in metric.compute().items()}
