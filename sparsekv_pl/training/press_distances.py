"""How far each press still is from its ceiling, for an EvictionAugPress that draws the distant ones more often."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor

from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.nesting import presses_in
from sparsekv_pl.reporting.logged_terms import KEPT, MOST

STATE = "press_distances"
"""Checkpoint key of the distances."""
MEMORY = 0.9
"""Share of the former distance in the running mean after each step."""


class PressDistances:
    """Running means of the attention that each press misses of the most that its budget could keep.

    All micro-batches of an optimizer step draw with the distances of the steps before it; validation draws without.

    Parameters
    ----------
    press
        The training press; those in it that draw ``by_distance`` get the distances.
    """

    def __init__(self, press: BasePress | None) -> None:
        found = [] if press is None else [one for one in presses_in(press) if isinstance(one, EvictionAugPress)]
        self.drawing = [one for one in found if one.by_distance]
        self.means: dict[str, float] = {}
        self._step: list[dict[str, Tensor]] = []

    def start(self) -> None:
        """Begin a training: forget the micro-batches of an optimizer step that was interrupted."""
        self._step.clear()
        self.apply(True)

    def apply(self, on: bool) -> None:
        """Let the presses draw by the distances, or by their weights alone."""
        for drawing in self.drawing:
            drawing.distances = dict(self.means) if on else {}

    def measure(self, terms: Mapping[str, Tensor]) -> None:
        """Take a micro-batch's logged terms, which are the same on all ranks."""
        if self.drawing:
            presses = [name.removeprefix(f"{KEPT}/") for name in terms if name.startswith(f"{KEPT}/")]
            self._step.append({press: terms[f"{MOST}/{press}"] - terms[f"{KEPT}/{press}"] for press in presses})

    def settle(self) -> None:
        """Add the means of the optimizer step's micro-batches; a press that was not measured keeps its distance."""
        for press in dict.fromkeys(press for measured in self._step for press in measured):
            new = float(torch.stack([one[press] for one in self._step if press in one]).mean())
            if math.isfinite(new):  # else the step is skipped
                self.means[press] = MEMORY * self.means.get(press, new) + (1 - MEMORY) * new
        self._step.clear()
        self.apply(True)

    def state_dict(self) -> dict[str, Any]:
        """Return the distances for a checkpoint, saved after an optimizer step; empty if no press draws by them."""
        return {STATE: dict(self.means)} if self.drawing else {}

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result from a checkpoint; one without distances leaves the presses' weights.

        The presses draw by them at once: strategies that shard restore after ``start``.
        """
        self.means = dict(checkpoint.get(STATE, {}))
        self.apply(True)
