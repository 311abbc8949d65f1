"""What a step needs to know, said once: an objective makes the request, the teacher and the eviction answer it."""

from dataclasses import dataclass

from sparsekv_pl.models.layer_outputs import LayerOutput


@dataclass(frozen=True)
class Request:
    """What is wanted besides the hidden states of the continuation; ``|`` adds up what several want."""

    teacher: bool = False
    """The teacher's hidden states, with the full cache."""
    scores: bool = False
    """The press's scores, differentiable, for a selection loss, each with the teacher's attention."""
    contexts: bool = False
    """The evicted contexts, to be asked about; so the context positions of the kept keys are followed."""
    press_losses: bool = False
    """The loss terms that presses ask to add (SparseRegPress)."""
    layers: frozenset[LayerOutput] = frozenset()
    """Layer outputs of student and teacher, by kind."""

    def __or__(self, other: "Request") -> "Request":
        return Request(
            self.teacher or other.teacher,
            self.scores or other.scores,
            self.contexts or other.contexts,
            self.press_losses or other.press_losses,
            self.layers | other.layers,
        )


NOTHING = Request()
"""The hidden states alone."""
