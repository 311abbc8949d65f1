"""The forms of the selection loss against slow references: values, gradients, what is left out, layer weights."""

import math
from typing import Any

import pytest
import torch
from kvpress import SnapKVPress
from torch import Tensor

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import Mixed, SelectionObjective
from sparsekv_pl.objectives.attention_mass import with_mass
from sparsekv_pl.objectives.objective import StudentView
from sparsekv_pl.objectives.score_alignment import evictable_keys, key_logits
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone

SHAPE = (2, 2, 24)
SINKS, WINDOW = 4, 3
RANKING: dict[str, Any] = {"form": "ranking", "sinks": SINKS, "top_share": 0.3}


def random(seed: int, shift: float = 0.0) -> Tensor:
    """(B, K, S) in [shift, shift + 1)."""
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) + shift


def windowed(scores: Tensor) -> Tensor:
    scores = scores.clone()
    scores[..., -WINDOW:] = scores.max() + 1
    return scores.requires_grad_()


def loss_of(
    scores: Tensor, mass: Tensor, order_only: bool = False, positions: Tensor | None = None, **settings: Any
) -> Tensor:
    return SelectionLoss(**settings)([(Selection(0, "some", scores, positions, order_only), mass)])["some"]


def slow_logits(scores: Tensor, temperature: float, standardise: bool) -> Tensor:
    """Of one head's evictable scores (n,)."""
    if bool((scores >= 0).all()):
        scores = (scores / scores.sum()).log()
        if not standardise:
            return scores
    deviation = (scores - scores.mean()).pow(2).mean().sqrt()
    return (scores - scores.mean()) / deviation / temperature


def slow_head(scores: Tensor, mass: Tensor, loss: SelectionLoss, standardise: bool) -> Tensor:
    """One head's loss from its evictable scores and mass (n,), pair by pair."""
    logits, target = slow_logits(scores, loss.temperature, standardise), mass / mass.sum()
    if loss.form == "cross_entropy":
        return -sum(
            t * (z - torch.stack([other.exp() for other in logits]).sum().log())
            for t, z in zip(target, logits, strict=True)
        )
    count = math.ceil(loss.top_share * len(scores))
    order = sorted(range(len(scores)), key=lambda i: -target[i].item())
    top, others = order[:count], order[count:]
    gains = {i: target[i] - sum(target[j] for j in others) / len(others) for i in top}
    pairs = {i: (1 + sum((logits[j] - logits[i]).exp() for j in others)).log() for i in top}
    return sum(gains[i] * pairs[i] for i in top) / sum(gains.values())


def slow_loss(scores: Tensor, mass: Tensor, keys: Tensor, loss: SelectionLoss, standardise: bool = False) -> Tensor:
    total, weights = torch.zeros(()), 0.0
    for row in range(SHAPE[0]):
        for head in range(SHAPE[1]):
            chosen = keys[row, head]
            weight = mass[row, head][chosen].sum().item() if loss.heads == "mass" else 1.0
            own = slow_head(scores[row, head][chosen], mass[row, head][chosen], loss, standardise)
            total, weights = total + weight * own, weights + weight
    return total / weights


def same(actual: Tensor, wanted: Tensor, scores: Tensor) -> None:
    """Values and gradients."""
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (actual, wanted)]
    assert gradients[1].abs().sum() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", ["mass", "equal"])
@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["masses", "any sign"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("form", ["cross_entropy", "ranking"])
def test_equals_a_reference_written_out(form: Any, temperature: float, shift: float, heads: Any) -> None:
    loss = SelectionLoss(SINKS, heads, form, temperature, top_share=0.3)
    scores, mass = windowed(random(1, shift)), random(2)
    keys = torch.zeros(SHAPE, dtype=torch.bool)
    keys[..., SINKS:-WINDOW] = True
    actual = loss([(Selection(0, "some", scores), mass)])["some"]
    same(actual, slow_loss(scores, mass, keys, loss, standardise=form == "ranking"), scores)


def test_golden_ranking() -> None:
    """Three keys, standardised to +-sqrt(3/2) and 0; the teacher's one top key is scored lowest, then highest."""
    scores, mass, high = torch.tensor([[[-1.0, -2.0, -3.0]]]), torch.tensor([[[0.1, 0.1, 0.8]]]), math.sqrt(1.5)
    for order, wrong in ((1, high), (-1, -high)):
        given = (order * (scores + 2) - 5).requires_grad_()
        loss = loss_of(given, mass, form="ranking", sinks=0, top_share=0.3)
        assert loss.item() == pytest.approx(math.log(1 + math.exp(2 * wrong) + math.exp(wrong)), rel=1e-5)


@pytest.mark.parametrize("form", ["cross_entropy", "ranking"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_infinite_scores_are_left_out_as_padding_is(form: Any, side: str) -> None:
    """Of a padded row what is real counts as it would alone."""
    loss = SelectionLoss(sinks=0, form=form, top_share=0.3)
    scores, mass = random(1, -2.0), random(2)
    padding = torch.zeros(SHAPE, dtype=torch.bool)
    padding[0, :, :5] = side == "left"
    padding[0, :, -5:] = side == "right"
    padded = scores.masked_fill(padding, -torch.inf).requires_grad_()
    actual = loss([(Selection(0, "some", padded), mass)])["some"]
    same(actual, slow_loss(padded, mass, ~padding, loss, standardise=form == "ranking"), padded)
    (gradient,) = torch.autograd.grad(loss([(Selection(0, "some", padded), mass)])["some"], padded)
    assert gradient.isfinite().all()
    assert not gradient[padding].any()


@pytest.mark.parametrize("form", ["cross_entropy", "ranking"])
def test_chunks_are_mapped_to_their_positions(form: Any) -> None:
    """A later chunk's keys are some of the context's, in an order of their own."""
    loss, mass = SelectionLoss(SINKS, form=form, top_share=0.3), random(2)
    positions = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i))[:15] for i in range(4)])
    positions = positions.view(2, 2, 15)
    scores = random(1, -2.0)[..., :15].clone().requires_grad_()
    actual = loss([(Selection(0, "some", scores, positions), mass)])["some"]
    wanted = slow_loss(scores, mass.gather(-1, positions), positions >= SINKS, loss, standardise=form == "ranking")
    same(actual, wanted, scores)


def test_lagkv_is_standardised_though_its_scores_are_positive() -> None:
    scores, mass = windowed(1 + 0.01 * random(1)), random(2)
    flat = loss_of(scores, mass)
    own = loss_of(scores, mass, order_only=True, temperature=0.5)
    keys = torch.zeros(SHAPE, dtype=torch.bool)
    keys[..., SINKS:-WINDOW] = True
    same(own, slow_loss(scores, mass, keys, SelectionLoss(temperature=0.5), standardise=True), scores)
    gradients = [
        torch.autograd.grad(loss, scores)[0].abs().sum() for loss in (flat, loss_of(scores, mass, order_only=True))
    ]
    assert gradients[1] > 10 * gradients[0]


@pytest.mark.parametrize("form", ["cross_entropy", "ranking"])
@pytest.mark.parametrize("what", ["ties", "one key", "no key", "no mass"])
def test_degenerate_heads_give_finite_gradients(form: Any, what: str) -> None:
    scores, mass = random(1, -2.0), random(2)
    if what == "ties":
        scores[:] = -1.0
        scores[0, 0, :2] = -0.5  # what is highest, twice, would count as a rule
    if what in ("one key", "no key"):
        scores[1, 1, int(what == "one key") :] = torch.inf
    if what == "no mass":
        mass[1] = 0
    scores.requires_grad_()
    loss = loss_of(scores, mass, sinks=0, form=form)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("heads", ["mass", "equal"])
@pytest.mark.parametrize("form", ["cross_entropy", "ranking"])
def test_layers_count_by_their_weights(form: Any, heads: Any) -> None:
    masses = {layer: random(10 + layer) for layer in range(3)}
    selections = [Selection(layer, "some", random(layer, -2.0).requires_grad_()) for layer in range(3)]
    single = [loss_of(s.scores, masses[s.layer], form=form, heads=heads) for s in selections]
    counts = [float(masses[layer][..., 4:].sum()) if heads == "mass" else 1.0 for layer in range(3)]
    given = [0.5, 0.0, 2.0]
    wanted = sum(w * c * loss for w, c, loss in zip(given, counts, single, strict=True))
    wanted = wanted / sum(w * c for w, c in zip(given, counts, strict=True))
    weighted = SelectionLoss(form=form, heads=heads, layer_weights=given)(with_mass(selections, masses))["some"]
    torch.testing.assert_close(weighted, wanted)
    equal = SelectionLoss(form=form, heads=heads)(with_mass(selections, masses))["some"]
    alike = SelectionLoss(form=form, heads=heads, layer_weights=[3.0] * 3)(with_mass(selections, masses))["some"]
    torch.testing.assert_close(alike, equal)
    assert not torch.isclose(weighted, equal)


def test_layer_weights_are_of_the_models_layers(tiny_backbone: MakeBackbone) -> None:
    """Also of those in which nothing is evicted, of which a selection has no scores."""
    for weights in ([1.0, 1.0], [1.0] * 5):
        with pytest.raises(ValueError, match=rf"layer_weights has {len(weights)} numbers and the model 4 layers"):
            Mixed([SelectionObjective(layer_weights=weights)]).check_layers(4, [0, 2])
    with pytest.raises(ValueError, match="is 0 in every layer that presses evict from, 0, 2"):
        SelectionObjective(layer_weights=[0.0, 1.0, 0.0, 1.0]).check_layers(4, [0, 2])
    weighing = SelectionObjective(layer_weights=[1.0, 5.0, 2.0, 5.0])
    weighing.check_layers(4, [0, 2])
    masses = {layer: random(10 + layer) for layer in (0, 2)}
    selections = [Selection(layer, "some", random(layer).requires_grad_()) for layer in (0, 2)]
    dense = [Selection(place, "some", one.scores) for place, one in enumerate(selections)]
    expected = SelectionLoss(layer_weights=[1.0, 2.0])(with_mass(dense, {0: masses[0], 1: masses[2]}))["some"]
    torch.testing.assert_close(weighing.selection_loss(with_mass(selections, masses))["some"], expected)
    with pytest.raises(ValueError, match="has 1 numbers and the model 2 layers"):
        EITModule(tiny_backbone(), RealEviction(SnapKVPress()), SelectionObjective(layer_weights=[1.0]))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"form": "listwise"}, "form='listwise': give one of cross_entropy, ranking"),
        ({"heads": "some"}, "heads='some': give one of mass, equal"),
        ({"sinks": -1}, "sinks=-1"),
        ({"temperature": 0.0}, "temperature=0.0: give a finite number above 0"),
        ({"top_share": 0.0}, "top_share=0.0"),
        ({"top_share": 1.0}, "top_share=1.0"),
        ({"layer_weights": []}, r"layer_weights=\[\]"),
        ({"layer_weights": [1.0, -1.0]}, r"layer_weights=\[1.0, -1.0\]"),
        ({"layer_weights": [0.0, 0.0]}, r"layer_weights=\[0.0, 0.0\]"),
    ],
)
def test_bad_settings_name_the_field(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SelectionLoss(**settings)
    with pytest.raises(ValueError, match=f"SelectionObjective.{complaint}"):
        SelectionObjective(**settings)


def test_the_objective_passes_its_settings_on() -> None:
    settings: dict[str, Any] = {"form": "ranking", "temperature": 0.5, "top_share": 0.4, "layer_weights": [1.0]}
    pair = (Selection(0, "Knorm", random(1, -2.0).requires_grad_()), random(2))
    view = StudentView(torch.zeros(1, 2), torch.zeros(1), torch.zeros(3, 2), selections=[pair])
    terms = SelectionObjective(sinks=2, heads="equal", **settings)(view)
    wanted = SelectionLoss(sinks=2, heads="equal", **settings)([pair])["Knorm"]
    torch.testing.assert_close(terms["loss"], wanted)
    torch.testing.assert_close(terms["selection/Knorm"], wanted)
    assert not torch.isclose(wanted, SelectionLoss(sinks=2, heads="equal")([pair])["Knorm"])


def test_a_rows_shares_do_not_depend_on_the_other_rows() -> None:
    scores = torch.cat([random(3), random(4, -0.5), random(5)])  # masses in some rows, none in others
    scores[0, 0, 3] = scores[-1, 1, 5] = scores.amax() + 1  # a tie between rows, which no rule made
    alone = [key_logits(row, evictable_keys(row, 0)) for row in scores.split(1)]
    torch.testing.assert_close(key_logits(scores, evictable_keys(scores, 0)), torch.cat(alone))
    assert evictable_keys(scores, 0).all()
