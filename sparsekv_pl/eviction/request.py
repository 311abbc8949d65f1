"""The request of a step: an objective makes it, the teacher and the eviction answer it."""

from dataclasses import dataclass

from sparsekv_pl.models.layer_outputs import LayerOutput


@dataclass(frozen=True)
class Request:
    """The results wanted besides the continuation's hidden states; ``|`` joins several requests."""

    teacher: bool = False
    """The teacher's hidden states, with the full cache."""
    scores: bool = False
    """The press's differentiable scores and the teacher's attention, for a selection loss."""
    contexts: bool = False
    """The evicted contexts, for objectives that continue them; the kept keys' context positions are then tracked."""
    press_losses: bool = False
    """The loss terms that presses ask to add (SparseRegPress)."""
    chunks: bool = False
    """The hidden states of a context's chunks after the first, which read the evicted cache, and the teacher's."""
    first_chunk: bool = False
    """The hidden states of the context's first chunk, which nothing was evicted from, and the teacher's."""
    full_cache: bool = False
    """The student's hidden states after the cache as it was before the eviction."""
    layers: frozenset[LayerOutput] = frozenset()
    """Layer outputs of student and teacher, by kind."""

    def __or__(self, other: "Request") -> "Request":
        return Request(
            self.teacher or other.teacher,
            self.scores or other.scores,
            self.contexts or other.contexts,
            self.press_losses or other.press_losses,
            self.chunks or other.chunks,
            self.first_chunk or other.first_chunk,
            self.full_cache or other.full_cache,
            self.layers | other.layers,
        )


NOTHING = Request()
"""A request for the hidden states alone."""
