"""torchmetrics of this project; they reduce over ranks."""

from sparsekv_pl.metrics.cases import CaseValues
from sparsekv_pl.metrics.perplexity import ContinuationPerplexity

__all__ = ["CaseValues", "ContinuationPerplexity"]
