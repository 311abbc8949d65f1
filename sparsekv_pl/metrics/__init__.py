"""torchmetrics of this project; they reduce over ranks."""

from sparsekv_pl.metrics.perplexity import ContinuationPerplexity, PerplexityAndKL
from sparsekv_pl.metrics.retrieval import RetrievalScores, retrieval_scores
from sparsekv_pl.metrics.sparsity import AttentionSparsity
from sparsekv_pl.metrics.stability import EvictionStability

__all__ = [
    "AttentionSparsity",
    "ContinuationPerplexity",
    "EvictionStability",
    "PerplexityAndKL",
    "RetrievalScores",
    "retrieval_scores",
]
