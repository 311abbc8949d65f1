"""The one batch that data makes and modules consume."""

from typing import TypedDict

from torch import Tensor

IGNORE = -100
"""Label of a token that no loss and no metric looks at."""


class Batch(TypedDict):
    """Context + continuation windows; the eviction happens between the two.

    ``labels`` equals ``continuation_ids`` where a token is supervised and ``IGNORE`` elsewhere; it is not shifted.
    Column 0 is never supervised: the last context token predicts it, and that token saw the full cache.
    """

    context_ids: Tensor
    """(B, L) int64. Every row has exactly L tokens: padding would be scored and kept like text."""
    continuation_ids: Tensor
    """(B, T) int64, padded on the right, where a causal model cannot see the padding."""
    labels: Tensor
    """(B, T) int64."""
    document_ids: list[str]
    """The documents that row b was made of, for error messages and for proving that splits are disjoint."""
    tasks: list[str]
    """"text", or the name of the retrieval task that made row b."""
