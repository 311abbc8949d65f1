"""torchmetrics of this project; they reduce over ranks."""

from sparsekv_pl.metrics.attention_sparsity import AttentionSparsity
from sparsekv_pl.metrics.mass_by_head import MassByHead
from sparsekv_pl.metrics.perplexity import ContinuationPerplexity
from sparsekv_pl.metrics.retrieval import retrieval_scores

__all__ = ["AttentionSparsity", "ContinuationPerplexity", "MassByHead", "retrieval_scores"]
