"""The selection loss: align a press's scores with the teacher's attention to the context."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.kept_mass import KeptMass, kept_shares
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.rank_means import means_by_name, weighted_mean
from sparsekv_pl.objectives.score_alignment import TINY, cross_entropy, evictable_keys, key_logits, ranking
from sparsekv_pl.reporting.logged_terms import KEPT, MOST, SELECTION

Form = Literal["cross_entropy", "ranking"]
Heads = Literal["mass", "equal"]


@dataclass(frozen=True)
class Target:
    """What the teacher's attention asks of one selection, without gradients."""

    selection: Selection
    shares: Tensor
    """(B, K, S) float32, each evictable key's share of the head's attention to evictable keys; 0 elsewhere."""
    evictable: Tensor
    """(B, K, S) bool, the keys that the scores select."""
    weights: Tensor
    """(B, K), the head's weight in the loss."""


@dataclass
class SelectionLoss:
    """Distance from the teacher's attention mass to a press's scores, in nats.

    A weighted mean over layers, chunks, batch rows and KV heads.

    Parameters
    ----------
    sinks
        Number of first context tokens left out: every press keeps them, and they would take most of the mass.
    heads
        "mass": a head's weight is its attention to evictable keys, so that the few retrieving heads are not outweighed
        by the many that attend to the sinks. "equal": every head has the same weight.
    form
        "cross_entropy": the press's normalised scores should equal the teacher's mass. "ranking": the keys with most of
        the teacher's attention should outrank the others, in any proportion. See score_alignment.py.
    temperature
        Divides standardised scores: all scores in a ranking; in a cross-entropy those without a natural scale (Knorm,
        KeyDiff, LagKV). A value below 1 lets them become as peaked as attention.
    top_share
        For "ranking": the fraction of a head's evictable keys in the top. Independent of the step's compression ratio,
        because scores also come from presses that were not drawn, and one order serves every ratio.
    layer_weights
        One weight per layer of the model, in order; equal if not given. Weights of layers in which presses do not
        evict (windows) are not used.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    sinks: int = 4
    heads: Heads = "mass"
    form: Form = "cross_entropy"
    temperature: float = 1.0
    top_share: float = 0.25
    layer_weights: list[float] | None = None

    def __post_init__(self) -> None:
        for name, kind in {"heads": Heads, "form": Form}.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(get_args(kind))}")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: give 0 or more tokens")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give a finite number above 0")
        if not 0 < self.top_share < 1:
            raise ValueError(f"top_share={self.top_share}: give a fraction of the keys between 0 and 1")
        weights = self.layer_weights
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(f"layer_weights={weights}: give a number of at least 0 per layer, not all 0, or null")

    def __call__(self, selections: Iterable[tuple[Selection, Tensor]]) -> dict[str, Tensor]:
        """Return ``losses`` of the selections, each with the teacher's mass (B, K, L) in its layer."""
        return self.losses(self.targets(selections))

    @torch.no_grad()
    def targets(self, selections: Iterable[tuple[Selection, Tensor]]) -> list[Target]:
        """Return the target of each selection, which comes with the teacher's mass (B, K, L) in its layer."""
        return [self._target(selection, mass_BKL) for selection, mass_BKL in selections]

    def losses(self, targets: Iterable[Target]) -> dict[str, Tensor]:
        """Return each press's scalar loss by name, differentiable with respect to its scores.

        Scores without a gradient (of a random press, for example) are left out, so the result may be empty.
        """
        return {press: weighted_mean(*found) for press, found in self.by_press(targets).items()}

    def by_press(self, targets: Iterable[Target]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each press's losses (n,) and weights (n,) over heads, rows and layers; ``losses`` are their means."""
        terms: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for target in targets:
            if target.selection.scores.requires_grad:
                found = self._heads(target).flatten(), target.weights.flatten()
                terms.setdefault(target.selection.press, []).append(found)
        return {press: _together(found) for press, found in terms.items()}

    @torch.no_grad()
    def kept_mass(self, targets: Iterable[Target]) -> Iterator[KeptMass]:
        """Yield the attention that each selection keeps, of the same keys and heads as the loss; gradients or not."""
        for target in targets:
            selection = target.selection
            kept = selection.scores.shape[-1] if selection.kept is None else selection.kept
            shares = kept_shares(target.shares, selection.scores, target.evictable, kept)
            yield KeptMass(selection.layer, selection.press, *shares, target.weights)

    def _heads(self, target: Target) -> Tensor:
        """Return the loss of each head, (B, K)."""
        selection, evictable = target.selection, target.evictable
        standardise = self.form == "ranking" or selection.order_only
        logits = key_logits(selection.scores.float(), evictable, self.temperature, standardise)
        if self.form == "ranking":
            return ranking(logits, target.shares, evictable, self.top_share)
        return cross_entropy(logits, target.shares, evictable)

    def _target(self, selection: Selection, mass_BKL: Tensor) -> Target:
        evictable = evictable_keys(selection.scores.float(), self.sinks, selection.positions)
        if selection.positions is not None:
            mass_BKL = mass_BKL.gather(-1, selection.positions)
        mass = torch.where(evictable, mass_BKL, 0)
        total = mass.sum(-1)
        weights = total if self.heads == "mass" else (total > 0).to(total)  # 0: no supervised token comes after
        weights = weights * (1.0 if self.layer_weights is None else self.layer_weights[selection.layer])
        return Target(selection, mass / total.unsqueeze(-1).clamp(min=TINY), evictable, weights)


def _together(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    values, weights = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(weights)


@dataclass
class SelectionObjective(Objective):
    """Align the press's own scores with the teacher's attention to the context.

    Parameters
    ----------
    sinks, heads, form, temperature, top_share, layer_weights
        See ``SelectionLoss``.
    """

    sinks: int = 4
    heads: Heads = "mass"
    form: Form = "cross_entropy"
    temperature: float = 1.0
    top_share: float = 0.25
    layer_weights: list[float] | None = None
    request = Request(teacher=True, scores=True)

    def __post_init__(self) -> None:
        try:
            self.selection_loss  # noqa: B018 - it checks the settings
        except ValueError as error:
            raise ValueError(f"SelectionObjective.{error}") from None

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        loss = self.selection_loss
        targets = loss.targets(view.selections)
        found = {f"{SELECTION}/{press}": items for press, items in loss.by_press(targets).items()}
        found |= _kept_by_press(loss.kept_mass(targets))
        names = [f"{term}/{press}" for term in (SELECTION, KEPT, MOST) for press in view.scorers]
        means = means_by_name(found, names, view.hidden_NE.device)
        losses = [mean for name, mean in means.items() if name.startswith(f"{SELECTION}/")]
        total = torch.stack(losses).mean() if losses else view.hidden_NE.new_zeros(())
        if not total.requires_grad:  # no trainable scores on this rank at this step
            total = total + 0 * view.hidden_NE.sum()  # backward needs a graph
        return {"loss": total, **{name: mean.detach() for name, mean in means.items()}}

    def check_layers(self, layers: int, evicted: Sequence[int]) -> None:
        """Raise ``ValueError`` if there is not one weight per layer of the model, or none above 0 where it evicts."""
        weights = self.layer_weights
        if weights is not None and len(weights) != layers:
            raise ValueError(
                f"SelectionObjective.layer_weights has {len(weights)} numbers and the model {layers} layers: give one "
                "per layer"
            )
        if weights is not None and not any(weights[layer] for layer in evicted):
            raise ValueError(
                f"SelectionObjective.layer_weights={weights} is 0 in every layer that presses evict from, "
                f"{', '.join(map(str, evicted))}: give one of them a weight above 0"
            )

    @property
    @override
    def selection_loss(self) -> SelectionLoss:
        return SelectionLoss(self.sinks, self.heads, self.form, self.temperature, self.top_share, self.layer_weights)


def _kept_by_press(found: Iterable[KeptMass]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by term and press, the attention that each head's selection keeps and the most it could, with weights."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for one in found:
        for term, shares in ((KEPT, one.kept), (MOST, one.most)):
            parts.setdefault(f"{term}/{one.press}", []).append((shares.flatten(), one.weights.flatten()))
    return {name: _together(own) for name, own in parts.items()}
