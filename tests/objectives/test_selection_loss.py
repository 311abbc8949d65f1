"""The teacher's attention mass, and the loss that aligns a press's scores with it."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    ScorerPress,
    SnapKVPress,
    TOVAPress,
)
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.attention.evicted_attention import CACHED, attention_implementation
from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.batch import IGNORE, Supervised
from sparsekv_pl.objectives.attention_mass import AttentionMass, with_mass
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.caught_scores import pinned
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.training.teacher import Teacher
from tests.random_models import Build

CONTEXT, CONTINUATION = 32, 10
SINKS = 4


def ids(seed: int = 0) -> tuple[Tensor, Tensor]:
    everything = torch.randint(0, 64, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(seed))
    return everything[:, :CONTEXT], everything[:, CONTEXT:]


def labels() -> Tensor:
    """Row 0 supervises labels 3..6, row 1 labels 1 and 9."""
    labels = torch.full((2, CONTINUATION), IGNORE)
    labels[0, 3:7] = labels[1, 1] = labels[1, 9] = 5
    return labels


@torch.no_grad()
def reference_mass(model: PreTrainedModel, labels: Tensor) -> list[Tensor]:
    """Eager attention of everything, then the rows before each label, then heads: written out."""
    with attention_implementation(model, "eager"):
        attentions = model.model(input_ids=torch.cat(ids(), 1), output_attentions=True).attentions
    masses = []
    for attention in attentions:
        mass = torch.zeros(2, 2, CONTEXT)
        for row in range(2):
            at = [CONTEXT + t - 1 for t in range(1, CONTINUATION) if labels[row, t] != IGNORE]
            if at:
                mass[row] = attention[row, :, at, :CONTEXT].mean(1).view(2, 2, CONTEXT).mean(1)
        masses.append(mass)
    return masses


def random_mass(seed: int = 0) -> Tensor:
    return torch.rand(2, 2, CONTEXT, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def random_scores(seed: int = 1) -> Tensor:
    return torch.rand(2, 2, CONTEXT, generator=torch.Generator().manual_seed(seed))


def loss_of(scores: Tensor, mass: Tensor, positions: Tensor | None = None, **settings: Any) -> Tensor:
    if not scores.requires_grad:
        scores = scores.clone().requires_grad_()
    return SelectionLoss(**({"sinks": SINKS} | settings))([(Selection(0, "some", scores, positions), mass)])["some"]


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
def test_mass_equals_eager_attention_of_the_supervised_rows(random_model: Build) -> None:
    model = random_model()
    mass = AttentionMass(Supervised.of(labels()), CONTEXT)
    with attention_implementation(model, CACHED):
        model.model(input_ids=torch.cat(ids(), 1), observer=mass)
    expected = reference_mass(model, labels())
    assert list(mass.mass) == [0, 1]
    for layer, wanted in enumerate(expected):
        torch.testing.assert_close(mass.mass[layer], wanted, rtol=1e-5, atol=1e-6)
        assert not mass.mass[layer].requires_grad


def test_mass_is_the_same_from_the_teacher_and_from_a_continuation_after_a_cache(random_model: Build) -> None:
    model, (context, continuation) = random_model(), ids()
    masses = [AttentionMass(Supervised.of(labels()), CONTEXT) for _ in range(2)]
    Teacher(model)(context, continuation, masses[0])
    prefilled = prefill(model, context, None)
    with attention_implementation(model, CACHED):
        model.get_decoder()(continuation, past_key_values=prefilled.cache, use_cache=True, observer=masses[1])
    for mass in masses:
        for layer, wanted in enumerate(reference_mass(model, labels())):
            torch.testing.assert_close(mass.mass[layer], wanted, rtol=1e-5, atol=1e-6)


def test_a_row_without_supervision_has_no_mass(random_model: Build) -> None:
    model, none = random_model(), labels()
    none[1] = IGNORE
    mass = AttentionMass(Supervised.of(none), CONTEXT)
    Teacher(model)(*ids(), mass)
    assert torch.equal(mass.mass[0][1], torch.zeros(2, CONTEXT))
    torch.testing.assert_close(mass.mass[0], reference_mass(model, none)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_products_beyond_float16_have_a_mass(autocast: bool) -> None:
    tokens, supervised = CONTEXT + CONTINUATION, Supervised.of(labels())
    query, key = 200 * torch.randn(2, 2, 2, tokens, 8, generator=torch.Generator().manual_seed(0)).half()
    products = query.float() @ key.float().transpose(2, 3)
    assert products.abs().max() > torch.finfo(torch.float16).max
    attention = (products / 8**0.5).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf).softmax(-1)
    mass = AttentionMass(supervised, CONTEXT)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        mass(0, *((query.float(), key.float()) if autocast else (query, key)), key)
    for row, count in enumerate(supervised.counts):
        rows = attention[row, :, supervised.columns[row, :count] + CONTEXT, :CONTEXT]
        torch.testing.assert_close(mass.mass[0][row], rows.mean(1))


def test_golden_numbers() -> None:
    """Behind one sink: shares 1/4 and 3/4 of the mass against equal scores, then against scores that match it."""
    mass = torch.tensor([[[0.9, 0.02, 0.06]]])
    equal, matching = torch.tensor([[[9.0, 2.0, 2.0]]]), torch.tensor([[[9.0, 1.0, 3.0]]])
    assert loss_of(equal, mass, sinks=1).item() == pytest.approx(math.log(2))
    assert loss_of(matching, mass, sinks=1).item() == pytest.approx(0.562335, abs=1e-6)
    # Negative scores -3 and -1, standardised to -1 and 1: shares e / (e + 1/e) and the rest.
    share = math.e / (math.e + 1 / math.e)
    expected = -0.25 * math.log(1 - share) - 0.75 * math.log(share)
    assert loss_of(torch.tensor([[[5.0, -3.0, -1.0]]]), mass, sinks=1).item() == pytest.approx(expected)


def test_each_press_has_a_loss_of_its_own_averaged_over_layers() -> None:
    masses = {0: random_mass(0), 1: random_mass(5)}
    scores = {(press, layer): random_scores(i) for i, (press, layer) in enumerate(product("ab", range(2)))}
    selections = [Selection(layer, press, x.requires_grad_()) for (press, layer), x in scores.items()]
    losses = SelectionLoss(heads="equal")(with_mass(selections, masses))
    assert set(losses) == {"a", "b"}
    for press, loss in losses.items():
        single = [loss_of(scores[press, layer], masses[layer], heads="equal") for layer in range(2)]
        torch.testing.assert_close(loss, torch.stack(single).mean())


def test_least_where_the_scores_are_proportional_to_the_mass() -> None:
    mass = random_mass()
    logits = (mass * 7).log().requires_grad_()
    best = loss_of(logits.exp(), mass)
    (gradient,) = torch.autograd.grad(best, logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
    for seed in range(5):
        assert loss_of(random_scores(seed), mass) > best


def test_sinks_and_pinned_keys_are_left_out() -> None:
    scores, mass = random_scores(), random_mass()
    scores[..., -5:] = scores.max() + 1
    scores.requires_grad_()
    loss = loss_of(scores, mass)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient[..., SINKS:-5] != 0).all()
    assert not gradient[..., :SINKS].any()
    assert not gradient[..., -5:].any()
    mass[..., :SINKS] = mass[..., -5:] = 99.0
    torch.testing.assert_close(loss_of(scores, mass), loss)


def test_a_single_highest_score_is_no_rule() -> None:
    scores = random_scores()
    assert not pinned(scores).any()
    scores[..., -1] = 2.0
    assert torch.equal(pinned(scores), scores == 2.0)


def test_scores_that_carry_no_gradient_are_left_out() -> None:
    mass = {0: random_mass()}
    trainable = Selection(0, "SnapKV", random_scores().requires_grad_())
    losses = SelectionLoss()(with_mass([trainable, Selection(0, "Random", random_scores(2))], mass))
    assert set(losses) == {"SnapKV"}
    assert SelectionLoss()(with_mass([Selection(0, "Random", random_scores(2))], mass)) == {}
    assert SelectionLoss()([]) == {}


@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(window_size=4),
        TOVAPress(),
        ExpectedAttentionPress(),
        KnormPress(),
        KeyDiffPress(),
        KeyRerotationPress(ExpectedAttentionPress()),
        EvictionAugPress([KnormPress(), SnapKVPress(window_size=4)], score_all=True),
        AdaKVPress(SnapKVPress(window_size=4)),
    ],
    ids=press_name,
)
def test_the_gradient_reaches_what_scores(random_model: Build, press: BasePress, chunk_tokens: int | None) -> None:
    if isinstance(press, AdaKVPress):
        chunk_tokens = None  # head-wise presses have one chunk
    model = random_model()
    mass = AttentionMass(Supervised.of(labels()), CONTEXT)
    Teacher(model)(*ids(), mass)
    eviction = RealEviction(press, chunk_tokens)
    selections = eviction(model, *ids(), compression_ratio=0.5, step=0, request=Request(scores=True)).selections
    losses = SelectionLoss()(with_mass(selections, mass.mass))
    assert len(losses) == (2 if isinstance(press, EvictionAugPress) else 1)
    torch.stack(list(losses.values())).sum().backward()
    looks_with_queries = not isinstance(press, (KnormPress, KeyDiffPress))
    for layer in model.model.layers:
        assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0
        assert layer.self_attn.k_proj.weight.grad.isfinite().all()
    # Of the last layer, whose queries serve nothing else.
    queries = model.model.layers[-1].self_attn.q_proj.weight.grad
    assert (queries is not None and bool(queries.any())) == looks_with_queries


@pytest.mark.parametrize("press", [SnapKVPress(window_size=4), KnormPress()], ids=press_name)
def test_what_is_kept_moves_towards_the_teachers_top_keys(random_model: Build, press: ScorerPress) -> None:
    model = random_model()
    teacher, kept = Teacher(model), 10
    mass = AttentionMass(Supervised.of(labels()), CONTEXT)
    teacher(*ids(), mass)
    eviction = RealEviction(press)
    evictable = slice(SINKS, CONTEXT - 4)

    def overlap(selections: list[Selection]) -> float:
        """Share of the teacher's top evictable keys among as many that the press ranks highest."""
        shares = []
        for selection in selections:
            both = (selection.scores[..., evictable], mass.mass[selection.layer][..., evictable])
            top = [torch.zeros_like(x).scatter(-1, x.topk(kept, -1).indices, 1.0) for x in both]
            shares.append((top[0] * top[1]).sum(-1).mean() / kept)
        return float(torch.stack(shares).mean())

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    overlaps, losses = [], []
    for step in range(25):
        selections = eviction(model, *ids(), compression_ratio=0.5, step=step, request=Request(scores=True)).selections
        loss = SelectionLoss(SINKS)(with_mass(selections, mass.mass))[press_name(press)]
        overlaps.append(overlap(selections))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert overlaps[-1] > overlaps[0] + 0.2
