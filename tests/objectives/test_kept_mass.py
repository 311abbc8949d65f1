"""The teacher's attention that a selection keeps, and the most that its budget could keep, against loops over keys."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, BasePress, KnormPress, RandomPress, SnapKVPress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives import selection_loss
from sparsekv_pl.objectives.kept_mass import KeptMass
from sparsekv_pl.objectives.objective import StudentView
from sparsekv_pl.objectives.selection_loss import SelectionLoss, SelectionObjective
from sparsekv_pl.presses.caught_scores import pinned

Build = Callable[..., PreTrainedModel]
ROWS, CONTEXT, SINKS, RATIO = 2, 32, 4, 0.7


def random_mass(seed: int) -> Tensor:
    return torch.rand(ROWS, 2, CONTEXT, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def kept_masses(loss: SelectionLoss, pairs: list[tuple[Selection, Tensor]]) -> list[KeptMass]:
    return list(loss.kept_mass(loss.targets(pairs)))


def by_loops(mass: list[float], evictable: set[int], kept: set[int]) -> tuple[float, float]:
    """Return the shares of one head's evictable mass that are kept, and that as many evictable keys could hold."""
    total = sum(mass[key] for key in evictable)
    best = sorted((mass[key] for key in evictable), reverse=True)[: len(kept & evictable)]
    return sum(mass[key] for key in kept & evictable) / total, sum(best) / total


@pytest.mark.parametrize("chunk_tokens", [None, 12])
@pytest.mark.parametrize("press", [KnormPress(RATIO), SnapKVPress(RATIO, window_size=4), RandomPress(RATIO, seed=0)])
def test_it_is_the_mass_of_what_the_eviction_keeps(
    press: BasePress, chunk_tokens: int | None, random_model: Build
) -> None:
    ids = torch.randint(0, 64, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    prefilled = prefill(random_model(), ids, press, chunk_tokens, request=Request(scores=True, contexts=True))
    last = prefilled.selections[-2:]  # what the last chunk keeps is what the cache holds
    pairs = [(selection, random_mass(layer)) for layer, selection in enumerate(last)]
    for found, (selection, mass) in zip(kept_masses(SelectionLoss(sinks=SINKS), pairs), pairs, strict=True):
        for row, head in product(range(ROWS), range(2)):
            held = range(CONTEXT) if selection.positions is None else selection.positions[row, head].tolist()
            by_rule = pinned(selection.scores)[row, head].tolist()
            evictable = {key for key, rule in zip(held, by_rule, strict=True) if key >= SINKS and not rule}
            kept = set(prefilled.positions[selection.layer][row, head].tolist())
            assert len(kept) == int(CONTEXT * (1 - RATIO))
            wanted = by_loops(mass[row, head].tolist(), evictable, kept)
            assert (float(found.kept[row, head]), float(found.most[row, head])) == pytest.approx(wanted)
            weight = sum(float(mass[row, head, key]) for key in evictable)
            assert float(found.weights[row, head]) == pytest.approx(weight)


def test_the_best_order_keeps_the_most_and_the_worst_the_least() -> None:
    mass = random_mass(3)
    for scores, best in ((mass, True), (-mass, False)):
        (found,) = kept_masses(SelectionLoss(sinks=SINKS), [(Selection(0, "some", scores, kept=12), mass)])
        assert torch.allclose(found.kept, found.most) == best
        assert (found.kept <= found.most + 1e-6).all() and (found.most < 1).all()


def test_everything_is_kept_without_a_ratio_and_a_wrapper_has_its_own(random_model: Build) -> None:
    ids = torch.randint(0, 64, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    kept = {
        ratio: prefill(random_model(), ids, press, request=Request(scores=True)).selections[0].kept
        for ratio, press in ((0.5, AdaKVPress(KnormPress(0.5))), (RATIO, SnapKVPress(RATIO, window_size=4)))
    }
    assert kept == {0.5: 16, RATIO: 9}
    (found,) = kept_masses(SelectionLoss(), [(Selection(0, "some", random_mass(1)), random_mass(2))])
    torch.testing.assert_close(found.kept, torch.ones(ROWS, 2))


@pytest.mark.parametrize("heads", ["mass", "equal"])
def test_it_is_logged_for_every_press_weighted_as_the_loss_weighs_heads(
    heads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a press whose scores have no gradient; two layers, one of which counts three times as much.

    One pass over the selections gives the loss and what is logged.
    """
    passes: list[Tensor] = []
    evictable = selection_loss.evictable_keys
    monkeypatch.setattr(selection_loss, "evictable_keys", lambda s, *more: (passes.append(s), evictable(s, *more))[1])
    scores = {(name, layer): random_mass(seed) for seed, (name, layer) in enumerate(product(("a", "b"), (0, 1)))}
    pairs = [
        (Selection(layer, name, one.requires_grad_(name == "a"), kept=9), random_mass(7 + layer))
        for (name, layer), one in scores.items()
    ]
    objective = SelectionObjective(sinks=SINKS, heads=heads, layer_weights=[1.0, 3.0])
    view = StudentView(torch.zeros(1, 2, requires_grad=True), torch.zeros(1), torch.zeros(3, 2), selections=pairs)
    terms = objective(view)
    assert len(passes) == len(pairs)
    alone = objective.selection_loss(pairs)["a"]
    torch.testing.assert_close(terms["loss"], alone, rtol=0, atol=0)
    own = [selection.scores for selection, _ in pairs[:2]]
    gradients = [torch.autograd.grad(loss, own) for loss in (terms["loss"], alone)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert terms.keys() == {"loss", "selection/a", *(f"kept_mass{k}/{name}" for k in ("", "_most") for name in "ab")}
    for name in "ab":
        found = [one for one in kept_masses(objective.selection_loss, pairs) if one.press == name]
        for kind, term in (("kept", "kept_mass"), ("most", "kept_mass_most")):
            above = sum(float((getattr(one, kind) * one.weights).sum()) for one in found)
            below = sum(float(one.weights.sum()) for one in found)
            assert float(terms[f"{term}/{name}"]) == pytest.approx(above / below)
    without = objective(StudentView(view.hidden_NE, view.labels_N, view.head, selections=pairs[2:]))
    assert without["loss"] == 0 and without.keys() == {"loss", "kept_mass/b", "kept_mass_most/b"}
