"""Layer outputs of student and teacher, against a loop over layers and tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv_pl.models.layer_outputs import LayerOutput
from sparsekv_pl.objectives import Layerwise, Mixed, StudentView
from sparsekv_pl.objectives.objective import LayerRows

LAYERS, TOKENS, WIDTH = 3, 7, 5


def rows(seed: int, tokens: int = TOKENS) -> LayerRows:
    """Layers whose outputs differ in size by a factor of 10 each."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(tokens, WIDTH, generator=generator) * 10.0**layer for layer in range(LAYERS)}


def view(student: LayerRows, teacher: LayerRows, kind: LayerOutput = "hidden") -> StudentView:
    hidden = torch.zeros(len(student[0]), WIDTH)
    labels = torch.zeros(len(student[0]), dtype=torch.long)
    return StudentView(hidden, labels, torch.zeros(11, WIDTH), layers={kind: (student, teacher)})


def by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    """A layer's loss, token by token."""
    norms = [sum(number**2 for number in row) for row in teacher.tolist()]
    floor = 0.01 * sorted(norms)[(len(norms) - 1) // 2]
    errors = [(s - t).square().sum() / max(norm, floor) for s, t, norm in zip(student, teacher, norms, strict=True)]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("kind", ["hidden", "attention"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_values_and_gradients_equal_a_loop(kind: LayerOutput, weights: list[float] | None) -> None:
    teacher = {layer: output.requires_grad_() for layer, output in rows(1).items()}
    student = {layer: output.requires_grad_() for layer, output in rows(0).items()}
    terms = Layerwise(kind, weights)(view(student, teacher, kind))
    shares = torch.tensor(weights or [1.0] * LAYERS) / sum(weights or [1.0] * LAYERS)
    copies = {layer: output.detach().requires_grad_() for layer, output in student.items()}
    expected = (torch.stack([by_hand(copies[i], teacher[i].detach()) for i in range(LAYERS)]) * shares).sum()
    torch.testing.assert_close(terms["loss"], expected)
    assert set(terms) == {"loss", f"layerwise_{kind}"}
    torch.testing.assert_close(terms[f"layerwise_{kind}"], expected.detach())
    terms["loss"].backward()
    expected.backward()
    for layer in range(LAYERS):
        torch.testing.assert_close(student[layer].grad, copies[layer].grad)
        assert teacher[layer].grad is None
        assert bool(copies[layer].grad.any()) == (shares[layer] > 0)  # type: ignore[union-attr]


def test_a_token_with_a_tiny_output_does_not_rule_the_mean() -> None:
    teacher = {0: torch.ones(TOKENS, WIDTH)}
    teacher[0][3] = 1e-6
    student = {0: teacher[0] + 0.1}
    error = 0.1**2 * WIDTH
    assert float(Layerwise()(view(student, teacher))["loss"]) == pytest.approx(
        (6 * error / WIDTH + error / (0.01 * WIDTH)) / TOKENS, rel=1e-4
    )
    silent = {0: torch.zeros(TOKENS, WIDTH, requires_grad=True)}
    loss = Layerwise()(view(silent, {0: torch.zeros(TOKENS, WIDTH)}))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert silent[0].grad is not None
    assert torch.isfinite(silent[0].grad).all()


def test_without_supervised_tokens_the_loss_is_0_and_keeps_a_graph() -> None:
    student = {layer: output.requires_grad_() for layer, output in rows(0, 0).items()}
    loss = Layerwise()(view(student, rows(1, 0)))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert student[0].grad is not None


def test_bfloat16_is_compared_in_float32() -> None:
    student, teacher = ({i: output.bfloat16() for i, output in rows(seed).items()} for seed in (0, 1))
    loss = Layerwise()(view(student, teacher))["loss"]
    assert loss.dtype == torch.float32
    exact = Layerwise()(view({i: x.float() for i, x in student.items()}, {i: x.float() for i, x in teacher.items()}))
    assert torch.equal(loss, exact["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "logits"}, "Layerwise.match='logits' must be one of hidden, attention"),
        ({"layer_weights": [1.0, -1.0, 1.0]}, r"Layerwise.layer_weights=\[1.0, -1.0, 1.0\]"),
        ({"layer_weights": [0.0, 0.0, 0.0]}, "at least one above"),
        ({"layer_weights": []}, r"Layerwise.layer_weights=\[\]"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layerwise(**settings)


def test_weights_for_another_number_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 weights for the 3 layers"):
        Mixed([Layerwise(layer_weights=[1.0, 2.0])]).check_layers(3, [0, 1, 2])
    Layerwise(layer_weights=[1.0, 2.0, 0.0]).check_layers(3, [2])
