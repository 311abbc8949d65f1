"""Sparsity of a model's attention over a batch of contexts, by layer and head."""

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
"""Measure of ``AttentionSparsity`` -> its name in reports, with the unit."""


@torch.no_grad()
def attention_sparsity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context_ids: Tensor
) -> dict[str, list[list[float]]]:
    """Measure attention sparsity in one pass with the full cache.

    Anchors are sinks, special tokens and punctuation. Recent tokens are not counted as anchors, because each query has
    its own.

    Parameters
    ----------
    model, tokenizer
        The model, and the tokenizer that finds the anchors.
    context_ids
        (B, L) token ids.

    Returns
    -------
    Measure -> (layers, H): means over all queries, in the layers in which presses evict.
    """
    anchors = Anchors(recent=0).mask(context_ids, tokenizer)
    statistics = AttentionStatistics(tokens=anchors)
    continue_from(model, context_ids, DynamicCache(), 0, observer=statistics)
    layers = [statistics.layers[layer] for layer in sorted(statistics.layers)]
    metric = AttentionSparsity(len(layers), layers[0].entropy.shape[1]).to(context_ids.device)
    for layer, measured in enumerate(layers):
        metric.update(layer, measured)
    return {name: values.tolist() for name, values in metric.compute().items()}
