"""torchmetrics of this project; they reduce over ranks."""

from sparsekv_pl.metrics.perplexity import ContinuationPerplexity
from sparsekv_pl.metrics.retrieval import retrieval_scores
from sparsekv_pl.metrics.sparsity import AttentionSparsity

__all__ = ["AttentionSparsity", "ContinuationPerplexity", "retrieval_scores"]
