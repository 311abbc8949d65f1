"""The chunked losses equal a plain dense reference, and the traps of the original SparseKV stay closed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.head import Head
from sparsekv_pl.objectives.losses import TokenLosses, distillation_loss, token_nll
from tests.objectives.losses_reference import dense_reference, gradients, make_inputs


@pytest.mark.parametrize("chunk_tokens", [1, 5, 16, 1000])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(0.7, 1.0), (2.0, 0.5), (0.7, 3.0), (0.0, 1.0)])
@pytest.mark.parametrize(("tokens", "hidden", "vocab", "masked"), [(23, 8, 101, 0.3), (48, 16, 37, 0.0)])
def test_values_and_gradients_equal_the_dense_reference(
    tokens: int,
    hidden: int,
    vocab: int,
    masked: float,
    kl_weight: float,
    temperature: float,
    chunk_tokens: int,
) -> None:
    student, teacher, head, labels = make_inputs(tokens, hidden, vocab, masked)
    student.requires_grad_()
    head.requires_grad_()
    losses = distillation_loss(
        student,
        teacher,
        head,
        labels,
        kl_weight=kl_weight,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    expected = dense_reference(student, teacher, head, labels, kl_weight, temperature)
    torch.testing.assert_close(losses.loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradients(losses.loss, student, head), gradients(expected, student, head), atol=1e-5, rtol=1e-5
    )
    assert losses.tokens == (labels != IGNORE).sum()
    torch.testing.assert_close(losses.loss.detach(), losses.cross_entropy + kl_weight * losses.kl)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("biased", "scale", "cap"), [(False, 0.25, None), (True, 1.0, None), (True, 0.5, 1.5)])
def test_heads_with_a_bias_a_scale_or_a_cap(biased: bool, scale: float, cap: float | None, temperature: float) -> None:
    """Also with another head for the teacher; bias and weight get their gradients."""
    student, teacher, weight, labels = make_inputs(19, 6, 41)
    noise, bias = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 41)
    head = Head(weight.requires_grad_(), bias.requires_grad_() if biased else None, scale, cap)
    teacher_head = Head(weight.detach() + 0.5 * noise, None, 0.3, cap)
    inputs = student.requires_grad_(), weight, *([bias] if biased else [])
    losses = distillation_loss(
        student,
        teacher,
        head,
        labels,
        kl_weight=0.5,
        temperature=temperature,
        teacher_head=teacher_head,
        chunk_tokens=4,
    )
    expected = dense_reference(student, teacher, head, labels, 0.5, temperature, teacher_head)
    torch.testing.assert_close(losses.loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(losses.loss, *inputs), gradients(expected, *inputs), atol=1e-5, rtol=1e-5)
    nll = token_nll(student, head, labels, chunk_tokens=4).sum() / losses.tokens
    torch.testing.assert_close(nll, losses.cross_entropy, atol=1e-5, rtol=1e-5)


def test_golden_number() -> None:
    """Logits ln(1, 3) against teacher's ln(1, 1), label 1: CE = ln(4/3); KL = ln(2) - ln(3)/2, by hand."""
    student = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    losses = distillation_loss(student, torch.zeros(1, 2), torch.eye(2), torch.tensor([1]), kl_weight=2.0)
    assert losses.cross_entropy.item() == pytest.approx(0.2876820724)
    assert losses.kl.item() == pytest.approx(0.1438410362)
    assert losses.loss.item() == pytest.approx(0.5753641449)
    # CE gives q - onehot = (1/4, -1/4); KL gives 2 (q - p) = (-1/2, 1/2).
    torch.testing.assert_close(gradients(losses.loss, student)[0], torch.tensor([[-0.25, 0.25]]))


def test_golden_number_with_temperature() -> None:
    """At T = 2 logits ln(1, 9) become those of q = (1/4, 3/4): T^2 KL = 4 (ln(2) - ln(3)/2), by hand."""
    student = torch.tensor([[0.0, math.log(9.0)]])
    losses = distillation_loss(
        student, torch.zeros(1, 2), torch.eye(2), torch.tensor([1]), kl_weight=1.0, temperature=2.0
    )
    assert losses.kl.item() == pytest.approx(0.5753641449)
    assert losses.cross_entropy.item() == pytest.approx(math.log(10 / 9))


def test_masked_tokens_are_in_neither_term() -> None:
    student, teacher, head, labels = make_inputs(20, 4, 11, masked=0.5)
    masked = labels == IGNORE
    assert masked.any()
    student.requires_grad_()
    losses = distillation_loss(student, teacher, head, labels, kl_weight=1.0)
    assert (gradients(losses.loss, student)[0][masked] == 0).all()
    garbage = torch.where(masked[:, None], torch.full_like(student, float("nan")), student)
    same = distillation_loss(garbage, garbage * 3, head, labels, kl_weight=1.0)
    alone = distillation_loss(student[~masked], student[~masked] * 3, head, labels[~masked], kl_weight=1.0)
    torch.testing.assert_close(same, alone, rtol=1e-6, atol=1e-6)


def test_all_tokens_masked_gives_zero_loss_and_zero_gradients() -> None:
    student, teacher, head, labels = make_inputs(6, 4, 11)
    student.requires_grad_()
    head.requires_grad_()
    losses = distillation_loss(student, teacher, head, torch.full_like(labels, IGNORE), kl_weight=1.0)
    assert [value.item() for value in losses] == [0, 0, 0, 0]
    for grad in gradients(losses.loss, student, head):
        assert (grad == 0).all()


def test_a_student_that_equals_its_teacher_has_no_kl() -> None:
    student, _, head, labels = make_inputs(9, 4, 11)
    assert distillation_loss(student, student.clone(), head, labels, kl_weight=1.0).kl == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_teacher_gets_no_gradient(temperature: float) -> None:
    student, teacher, head, labels = make_inputs(9, 4, 11)
    student.requires_grad_()
    teacher.requires_grad_()
    teacher_head = head.clone().requires_grad_()
    distillation_loss(
        student,
        teacher,
        head,
        labels,
        kl_weight=1.0,
        temperature=temperature,
        teacher_head=teacher_head,
    ).loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert teacher_head.grad is None


def test_without_a_teacher_it_is_plain_cross_entropy() -> None:
    student, _, head, labels = make_inputs(20, 4, 11)
    student.requires_grad_()
    losses = distillation_loss(student, None, head, labels, kl_weight=0.0, chunk_tokens=7)
    expected = F.cross_entropy(student @ head.T, labels, ignore_index=IGNORE)
    torch.testing.assert_close(losses.loss, expected)
    torch.testing.assert_close(gradients(losses.loss, student), gradients(expected, student))
    assert losses.kl == 0


def test_only_the_loss_carries_a_gradient_and_scales_it() -> None:
    student, teacher, head, labels = make_inputs(9, 4, 11)
    student.requires_grad_()

    def losses() -> TokenLosses:
        return distillation_loss(student, teacher, head, labels, kl_weight=1.0)

    assert not losses().cross_entropy.requires_grad
    assert not losses().kl.requires_grad
    torch.testing.assert_close(gradients(losses().loss / 4, student)[0] * 4, gradients(losses().loss, student)[0])


def test_gradcheck() -> None:
    student, teacher, head, labels = make_inputs(5, 3, 7, dtype=torch.float64)

    # The teacher reads the same head, but as a constant: finite differences would move it.
    constant_head, bias = Head(head.clone(), None, 0.5), torch.linspace(-1, 1, 7, dtype=torch.float64)

    def loss(student: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        return distillation_loss(
            student,
            teacher,
            Head(head, bias, 0.5, 2.0),
            labels,
            kl_weight=0.7,
            temperature=2.0,
            teacher_head=constant_head,
            chunk_tokens=2,
        ).loss

    student.requires_grad_()
    head.requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, head, bias.requires_grad_()))


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("under_autocast", [False, True])
def test_bfloat16_gradients_are_as_good_as_dense_ones(under_autocast: bool) -> None:
    """Against float64 of the same rounded inputs; Liger's fused loss errs by 4 to 23 % here."""
    inputs = make_inputs(40, 32, 503, masked=0.1)
    labels = inputs[3]
    student, teacher, head = (tensor.to(torch.bfloat16) for tensor in (inputs[0], inputs[1], inputs[2] * 0.2))
    exact = [tensor.double().requires_grad_() for tensor in (student, head)]
    truth = dense_reference(exact[0], teacher.double(), exact[1], labels, kl_weight=1.0)
    true_grads = gradients(truth, *exact)
    dtype = torch.float32 if under_autocast else torch.bfloat16
    student, teacher, head = (tensor.to(dtype) for tensor in (student, teacher, head))
    student.requires_grad_()
    head.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
        losses = distillation_loss(student, teacher, head, labels, kl_weight=1.0, chunk_tokens=8)
    assert losses.loss.dtype == torch.float32
    assert relative_error(losses.loss, truth) < 2e-3
    for grad, true_grad in zip(gradients(losses.loss, student, head), true_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, true_grad) < 1e-2


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_token_nll_is_the_cross_entropy_of_each_token(chunk_tokens: int) -> None:
    student, _, head, labels = make_inputs(20, 4, 11)
    student.requires_grad_()
    nll = token_nll(student, head, labels, chunk_tokens=chunk_tokens)
    expected = F.cross_entropy(student @ head.T, labels, ignore_index=IGNORE, reduction="none").detach()
    torch.testing.assert_close(nll, expected)
    assert not nll.requires_grad
    assert (nll[labels == IGNORE] == 0).all()
    mean = nll.sum() / (labels != IGNORE).sum()
    cross_entropy = distillation_loss(student, None, head, labels, kl_weight=0.0).cross_entropy
    torch.testing.assert_close(mean, cross_entropy)


def test_token_nll_of_bfloat16_is_float32() -> None:
    student, _, head, labels = make_inputs(8, 4, 11, dtype=torch.bfloat16)
    assert token_nll(student, head, labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight must be at least 0, not -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight must be at least 0, not nan"),
        ({"kl_weight": 1.0, "temperature": 0.0}, "temperature must be greater than 0, not 0.0"),
        ({"kl_weight": 1.0, "chunk_tokens": 0}, "chunk_tokens must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    student, teacher, head, labels = make_inputs(4, 3, 7)
    with pytest.raises(ValueError, match=message):
        distillation_loss(student, teacher, head, labels, **settings)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit() -> None:
    student, teacher, head, labels = make_inputs(4, 3, 7)
    with pytest.raises(ValueError, match=r"kl_weight 1.0 needs teacher_NE"):
        distillation_loss(student, None, head, labels, kl_weight=1.0)
    with pytest.raises(ValueError, match=r"student_NE must be \(N, E\).*flatten"):
        distillation_loss(student.view(2, 2, 3), teacher, head, labels.view(2, 2), kl_weight=1.0)
    with pytest.raises(ValueError, match=r"teacher_NE must be \(N, E\).*\(3, 3\)"):
        distillation_loss(student, teacher[:3], head, labels, kl_weight=1.0)
    with pytest.raises(ValueError, match=r"bfloat16 and its head torch.float32: cast one"):
        distillation_loss(student.bfloat16(), teacher, head, labels, kl_weight=1.0)
    with pytest.raises(ValueError, match=r"student's head has 7 tokens and the teacher's 6"):
        distillation_loss(student, teacher, head, labels, kl_weight=1.0, teacher_head=head[:6])
    with pytest.raises(ValueError, match=r"hidden_NE must be \(N, E\)"):
        token_nll(student[:2], head, labels)
