"""EvictionAugPress: several presses, one drawn per step."""

import math
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress, ScorerPress
from torch import nn
from transformers import PreTrainedModel

from sparsekv_pl.models.seeding import random_for
from sparsekv_pl.presses.caught_scores import CaughtScores
from sparsekv_pl.presses.nesting import press_name, presses_in, scorers_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.step_draws import Draws
from sparsekv_pl.presses.sync_free import no_waiting_on
from sparsekv_pl.presses.traits import traits_of

LEAST = 0.1
"""Smallest distance in the odds, as a share of the largest."""


@dataclass
class EvictionAugPress(BasePress, Draws):
    """Evict with a press drawn at random at every step: data augmentation by eviction method.

    The draw depends only on ``seed``, the step and the odds, so all layers and ranks use the same press. No gradient
    flows through the draw; gradients flow through the kept pairs, as in any kvpress press.

    Parameters
    ----------
    presses
        The presses to draw from.
    weights
        Relative odds, one per press; equal if not given.
    seed
        Seed of the draws.
    score_all
        Let the scorers that were not drawn score too, without evicting, so that a selection loss trains all of them at
        every step. Costs their scoring, but no second pass.
    by_distance
        Multiply the odds by how far each press still is from its ceiling: the share of the teacher's attention that it
        misses of the most that its budget could keep. Needs a selection loss, which measures it at every step.

    Attributes
    ----------
    distances
        Name -> distance of each scorer, a running mean that training sets and its checkpoints hold
        (training/press_distances.py).

    Raises
    ------
    ValueError
        For an empty list, an object that is no press, bad weights, or a nested EvictionAugPress with the same seed.
    """

    presses: list[BasePress]
    weights: list[float] | None = None
    seed: int = 0
    score_all: bool = False
    by_distance: bool = False
    distances: dict[str, float] = field(default_factory=dict, init=False)
    drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.presses:
            raise ValueError("EvictionAugPress.presses is []: name at least one press")
        for press in self.presses:
            if not isinstance(press, BasePress):
                raise ValueError(
                    f"EvictionAugPress.presses has {press!r}, which is no press: give one of kvpress or sparsekv_pl"
                )
            if any(isinstance(inner, EvictionAugPress) and inner.seed == self.seed for inner in presses_in(press)):
                raise ValueError(
                    f"EvictionAugPress.seed is {self.seed}, as is that of the EvictionAugPress inside it, so both "
                    "would draw alike and some presses never: give them different seeds, or one list of presses"
                )
        if self.weights is None:
            self.weights = [1.0] * len(self.presses)
        sound = all(0 <= weight < math.inf for weight in self.weights) and sum(self.weights) > 0
        if len(self.weights) != len(self.presses) or not sound:
            raise ValueError(
                f"EvictionAugPress.weights={self.weights}: give one non-negative weight for each of the "
                f"{len(self.presses)} presses, not all 0"
            )
        self.drawn = [weight > 0 for weight in self.weights].index(True)

    @property
    def press(self) -> BasePress:
        """The press of this step."""
        return self.presses[self.drawn]

    @property
    def compression_ratio(self) -> float:
        """The ratio of this step's press; setting it sets all presses' ratios."""
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        for press in self.presses:
            set_compression_ratio(press, value)

    def draw(self, step: int) -> BasePress:
        """Choose the press of ``step`` and return it."""
        rng = random_for("press", self.seed, step)
        self.drawn = rng.choices(range(len(self.presses)), self.odds)[0]
        return self.press

    @property
    def odds(self) -> list[float]:
        """Relative odds of the presses at the next draw.

        A press near its ceiling keeps a tenth of the farthest one's distance, so that it is still drawn. A press that
        was not measured, or whose scores cannot train, counts as the mean of the others.
        """
        assert self.weights is not None
        found = [self._distance(press) for press in self.presses]
        known = [distance for distance in found if distance is not None]
        if not self.by_distance or not known or not max(known):
            return self.weights
        mean, least = sum(known) / len(known), LEAST * max(known)
        return [
            weight * max(mean if distance is None else distance, least)
            for weight, distance in zip(self.weights, found, strict=True)
        ]

    def _distance(self, press: BasePress) -> float | None:
        """Return the mean distance of the scorers in ``press``; None if there is none to train."""
        known = [self.distances.get(press_name(scorer)) for scorer in scorers_in(press)]
        measured = [distance for distance in known if distance is not None]
        return sum(measured) / len(measured) if measured and traits_of(press).trainable else None

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator:
        """Evict with the drawn press inside the block."""
        with ExitStack() as stack:
            if others := self._others():
                stack.enter_context(ScoringPress(others)(model))  # first: it must see the keys before they are evicted
            yield stack.enter_context(self.press(model))

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Forward the call of an outer press to the presses inside."""
        for press in self.presses:
            press.post_init_from_model(model)

    def score(self, *_: Any, **__: Any) -> torch.Tensor:
        """Raise ``ValueError``: presses that need an inner press's scores (DMSPress) cannot wrap this one."""
        raise ValueError("EvictionAugPress has no scores of its own: put it around the press that asks")

    def forward_hook(self, module: nn.Module, input: list[Any], kwargs: dict[str, Any], output: Any) -> Any:
        """Evict from one layer with the drawn press; called by ComposedPress and PrefillDecodingPress."""
        if others := self._others():
            ScoringPress(others).forward_hook(module, input, kwargs, output)
        return self.press.forward_hook(module, input, kwargs, output)

    def _others(self) -> list[ScorerPress]:
        """Return the scorers that score in addition to this step's press."""
        others = [scorer for press in self.presses if press is not self.press for scorer in scorers_in(press)]
        return others if self.score_all else []


@dataclass
class ScoringPress(BasePress):
    """Score with several scorers and keep everything."""

    scorers: list[ScorerPress]
    scored: list[CaughtScores] = field(default_factory=list, init=False)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        for scorer in self.scorers:
            scorer.post_init_from_model(model)

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with no_waiting_on(keys.device):
            for scorer in self.scorers:
                scores = scorer.score(module, hidden_states, keys, values, attentions, kwargs)
                self.scored.append(CaughtScores(int(module.layer_idx), scorer, scores))  # type: ignore[arg-type]
        return keys, values
