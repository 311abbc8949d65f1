"""The terms of objectives on a view, and on the joined views of parts of a batch."""

from typing import Any

import pytest
import torch

from sparsekv_pl.eviction.interface import EvictedContext, Selection
from sparsekv_pl.objectives import (
    EIT,
    LM,
    Layerwise,
    Mixed,
    SelectionObjective,
    SparseLM,
    StudentView,
)
from sparsekv_pl.objectives.objective import joined


def view(seed: int = 0, tokens: int = 5, **settings: Any) -> StudentView:
    generator = torch.Generator().manual_seed(seed)
    return StudentView(
        hidden_NE=torch.randn(tokens, 8, generator=generator),
        labels_N=torch.randint(0, 11, (tokens,), generator=generator),
        head=torch.randn(11, 8, generator=torch.Generator().manual_seed(9)),
        teacher_NE=torch.randn(tokens, 8, generator=generator),
        **settings,
    )


def test_sparse_lm_adds_what_the_press_measured_with_its_gradient() -> None:
    entropy, l1 = torch.tensor(0.5, requires_grad=True), torch.tensor(0.25)
    terms = SparseLM()(view(press_losses={"entropy": entropy, "l1": l1}))
    plain = LM()(view())
    assert terms["loss"].item() == pytest.approx(plain["loss"].item() + 0.75)
    assert torch.equal(terms["cross_entropy"], plain["cross_entropy"])
    assert (terms["press/entropy"].item(), terms["press/l1"].item()) == (0.5, 0.25)
    assert not terms["press/entropy"].requires_grad
    terms["loss"].backward()
    assert entropy.grad == 1


def test_mixed_keeps_the_terms_of_two_of_a_kind_apart() -> None:
    mixed = Mixed([EIT(kl_weight=1.0), LM(), EIT(kl_weight=2.0, temperature=3.0)], [1.0, 0.5, 2.0])
    terms = mixed(view())
    first, second, third = (objective(view()) for objective in mixed.objectives)
    assert set(terms) == {"loss", "cross_entropy", "kl", "cross_entropy_2", "cross_entropy_3", "kl_3"}
    assert torch.equal(terms["kl"], first["kl"])
    assert torch.equal(terms["kl_3"], third["kl"])
    assert not torch.equal(terms["kl"], terms["kl_3"])
    expected = first["loss"] + 0.5 * second["loss"] + 2 * third["loss"]
    torch.testing.assert_close(terms["loss"], expected)


def part(seed: int, rows: int, tokens: int) -> StudentView:
    generator = torch.Generator().manual_seed(seed)
    outputs = [{layer: torch.randn(tokens, 8, generator=generator) for layer in (0, 1)} for _ in range(2)]
    ids = torch.randint(0, 11, (rows, 6 + seed), generator=generator)
    selection = Selection(0, "Knorm", torch.randn(rows, 2, 6 + seed, generator=generator))
    return view(
        seed,
        tokens,
        layers={"hidden": (outputs[0], outputs[1])},
        press_losses={"entropy": torch.tensor(float(seed))},
        contexts=[EvictedContext(ids, torch.zeros(ids.shape), lambda ids: ids)],
        selections=[(selection, torch.zeros(rows, 2, 6 + seed))],
    )


def test_the_parts_of_a_batch_are_joined_token_by_token() -> None:
    parts = [part(1, rows=1, tokens=4), part(2, rows=3, tokens=2)]
    whole = joined(parts, [1, 3])
    assert torch.equal(whole.hidden_NE, torch.cat([p.hidden_NE for p in parts]))
    assert torch.equal(whole.labels_N, torch.cat([p.labels_N for p in parts]))
    teachers = [p.teacher_NE for p in parts]
    assert whole.teacher_NE is not None
    assert torch.equal(whole.teacher_NE, torch.cat(teachers))  # type: ignore[arg-type]
    for which in (0, 1):
        for layer in (0, 1):
            expected = torch.cat([p.layers["hidden"][which][layer] for p in parts])
            assert torch.equal(whole.layers["hidden"][which][layer], expected)
    assert whole.press_losses["entropy"].item() == pytest.approx((1 * 1 + 3 * 2) / 4)  # by rows
    assert [context.ids.shape for context in whole.contexts] == [(1, 7), (3, 8)]
    assert [selection.scores.shape[0] for selection, _ in whole.selections] == [1, 3]


def test_no_term_of_nested_objectives_is_lost() -> None:
    nested = Mixed([Mixed([LM(), LM()]), LM(), Mixed([LM(), EIT()])])(view())
    assert len([name for name in nested if name.startswith("cross_entropy")]) == 5
    assert set(nested) >= {"cross_entropy", "cross_entropy_2", "cross_entropy_3", "kl"}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_would_maximise_or_spoil_a_loss_are_refused(weight: float) -> None:
    for make in (
        lambda: Mixed([LM()], [weight]),
        lambda: Layerwise(layer_weights=[weight, 1.0]),
        lambda: SelectionObjective(layer_weights=[weight, 1.0]),
    ):
        with pytest.raises(ValueError, match=r"weights=\["):
            make()
