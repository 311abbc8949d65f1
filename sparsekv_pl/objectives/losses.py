"""Cross-entropy and forward KL from hidden states, chunked: full-vocabulary logits never exist at once.

At a vocabulary of 151,936 the logits of 2,048 tokens take 1.2 GB in float32, and a dense loss holds several
such tensors for the student and the teacher. Here the forward pass takes a few tokens at a time, from hidden
states to logits to the gradient with respect to the hidden states, and frees the logits; backward only scales
the stored gradients. The matrix products are those of the dense loss: the logits of student and teacher, and the
gradient of the hidden states (and of the head, if it trains).

Shapes: N tokens, E hidden size, V vocabulary. Matrix products run in the dtype of their inputs (in autocast's
under autocast); softmax, sums and stored gradients are float32 (float64 for float64 inputs).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.head import Head, as_head

CHUNK_TOKENS = 256
"""Tokens whose logits exist together; benchmarks/chunked_loss.py compares sizes."""


class TokenLosses(NamedTuple):
    """Means over the supervised tokens, in nats; only ``loss`` carries a gradient."""

    loss: Tensor
    """() float: ``cross_entropy + kl_weight * kl``."""
    cross_entropy: Tensor
    """() float, detached."""
    kl: Tensor
    """() float, detached: temperature^2 * KL(teacher || student); 0 without a teacher."""
    tokens: Tensor
    """() int64: supervised tokens, the one denominator of both terms."""


def distillation_loss(
    student_NE: Tensor,
    teacher_NE: Tensor | None,
    head: Head | Tensor,
    labels_N: Tensor,
    *,
    kl_weight: float,
    temperature: float = 1.0,
    teacher_head: Head | Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLosses:
    """Compute the student's cross-entropy plus weighted forward KL, in nats, means over supervised tokens.

    With s and t the logits of student and teacher for one token, y its label, T the temperature,
    p = softmax(t / T) and q = softmax(s / T), a token costs

        -log softmax(s)[y]  +  kl_weight * T^2 * sum_v p_v (log p_v - log q_v)

    The factor T^2 keeps the size of the KL's gradient as T changes (Hinton et al. 2015, arXiv:1503.02531,
    section 2). Both sums are divided by the number of supervised tokens, so the loss does not depend on how
    rows are batched or padded. If no token is supervised, loss and gradients are zero. The teacher gets no gradient.

    Parameters
    ----------
    student_NE, teacher_NE
        Hidden states after the final norm, (N, E). The teacher may be None if ``kl_weight`` is 0.
    head
        The language-model head; its weight and bias get a gradient if they require one. A tensor is its weight (V, E).
    labels_N
        (N,) int64, already shifted: the hidden state of row n predicts ``labels_N[n]``. Rows labelled ``IGNORE``
        enter neither term.
    kl_weight, temperature
        kl_weight >= 0 and T > 0 of the formula.
    teacher_head
        The teacher's head, if it differs from the student's.
    chunk_tokens
        Tokens whose logits exist together; changes memory and speed, not the result.

    Raises
    ------
    ValueError
        For a setting out of range, shapes or dtypes that do not fit, or a KL without a teacher.
    """
    _check_settings(kl_weight, temperature, chunk_tokens, has_teacher=teacher_NE is not None)
    ignored_N = labels_N == IGNORE
    own = _matmul_head(as_head(head) if torch.is_grad_enabled() else as_head(head).detach())
    student = _matmul_input(student_NE)
    _check_rows("student_NE", student, own.weight, labels_N)
    teachers, teacher = own.detach(), None
    if teacher_NE is not None:
        if teacher_head is not None:
            teachers = _matmul_head(as_head(teacher_head).detach())
        teacher = _matmul_input(teacher_NE.detach())
        _check_rows("teacher_NE", teacher, teachers.weight, labels_N)
        _check_vocabularies(own.weight, teachers.weight)
        teacher = teacher.masked_fill(ignored_N[:, None], 0)
    settings = _Settings(kl_weight, temperature, own.scale, own.cap, chunk_tokens)
    with torch.autocast(student.device.type, enabled=False):  # the inputs have autocast's dtype already
        loss, cross_entropy, kl = _ChunkedLoss.apply(
            student.masked_fill(ignored_N[:, None], 0), own.weight, own.bias, labels_N, teacher, teachers, settings
        )
    return TokenLosses(loss, cross_entropy, kl, (~ignored_N).sum())


@torch.no_grad()
def token_nll(hidden_NE: Tensor, head: Head | Tensor, labels_N: Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Compute the negative log-likelihood of every label, (N,) float32 in nats, 0 at ``IGNORE``; no gradient.

    Arguments and errors are those of :func:`distillation_loss`.
    """
    _check_settings(0.0, 1.0, chunk_tokens, has_teacher=False)
    hidden, own = _matmul_input(hidden_NE), _matmul_head(as_head(head))
    _check_rows("hidden_NE", hidden, own.weight, labels_N)
    nll_N = hidden.new_empty(labels_N.shape, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(labels_N), chunk_tokens):
            logits = own.logits(hidden[rows])
            nll_N[rows] = F.cross_entropy(logits, labels_N[rows], ignore_index=IGNORE, reduction="none")
    return nll_N


@torch.no_grad()
def log_probabilities(hidden_NE: Tensor, head: Head | Tensor) -> Tensor:
    """Compute log-probabilities (N, V), float32 or wider, of hidden states (N, E) under a head; no gradient."""
    hidden, own = _matmul_input(hidden_NE), _matmul_head(as_head(head))
    with torch.autocast(hidden.device.type, enabled=False):
        return own.logits(hidden).log_softmax(-1)


class _Settings(NamedTuple):
    kl_weight: float
    temperature: float
    scale: float
    cap: float | None
    chunk_tokens: int


class _ChunkedLoss(torch.autograd.Function):
    """The loss of the supervised rows; forward computes the gradients too, while a chunk's logits exist.

    Ignored rows, set to zero before, are computed and masked: selecting rows would synchronise with the GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_NE: Tensor,
        head_VE: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        teacher_NE: Tensor | None,
        teacher_head: Head,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # float32 also keeps float16 gradients from underflowing before the loss scaler's factor reaches them.
        dtype = _sum_dtype(student_NE)
        needs_student, needs_head, needs_bias = ctx.needs_input_grad[:3]
        head = Head(head_VE, bias_V, settings.scale, settings.cap)
        student_grad = torch.empty_like(student_NE, dtype=dtype) if needs_student else None
        head_grad = torch.zeros_like(head_VE, dtype=dtype) if needs_head else None
        bias_grad = torch.zeros_like(head_VE[:, 0], dtype=dtype) if needs_bias else None
        sums = student_NE.new_zeros(2, dtype=dtype)
        for rows in _chunks(len(labels_N), settings.chunk_tokens):
            teacher_nE = None if teacher_NE is None else teacher_NE[rows]
            chunk_sums, grad = _loss_and_grad(
                student_NE[rows], head, labels_N[rows], teacher_nE, teacher_head, settings
            )
            sums += chunk_sums
            if bias_grad is not None:
                bias_grad += grad.masked_fill((labels_N[rows] == IGNORE)[:, None], 0).sum(0)
            grad = grad.to(head_VE.dtype)
            if student_grad is not None:
                student_grad[rows] = (grad @ head_VE).masked_fill_((labels_N[rows] == IGNORE)[:, None], 0)
            if head_grad is not None:
                head_grad += grad.T @ student_NE[rows]
            del grad  # or it would lie beside the next chunk's logits
        tokens = (labels_N != IGNORE).sum().clamp(min=1)
        ctx.save_for_backward(settings.scale / tokens.to(dtype), student_grad, head_grad, bias_grad)
        ctx.dtypes = student_NE.dtype, head_VE.dtype, head_VE.dtype if bias_V is None else bias_V.dtype
        cross_entropy, kl = (sums / tokens).unbind()
        ctx.mark_non_differentiable(cross_entropy, kl)
        return cross_entropy + settings.kl_weight * kl, cross_entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale, *saved = ctx.saved_tensors
        grads = [
            None if grad is None else (grad * (grad_loss * scale)).to(dtype)
            for grad, dtype in zip(saved, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None)


def _loss_and_grad(
    student_nE: Tensor,
    head: Head,
    labels_n: Tensor,
    teacher_nE: Tensor | None,
    teacher_head: Head,
    settings: _Settings,
) -> tuple[Tensor, Tensor]:
    """Compute the sums (2,) of cross-entropy and scaled KL over one chunk's rows.

    The second result is the gradient (n, V) of what the head's scale was applied to, without that scale. Works in place
    and frees each (n, V) buffer as soon as possible: at most four exist at once, five if logits are capped.
    """
    temperature = settings.temperature
    ignored_n = labels_n == IGNORE
    labels_n = labels_n.masked_fill(ignored_n, 0)
    logits = head.logits(student_nE)
    slope = None if head.cap is None else 1 - (logits / head.cap).square_()
    log_q = logits.log_softmax(-1)
    label_log_q = log_q.gather(-1, labels_n[:, None])
    cross_entropy, kl = -label_log_q[:, 0].masked_fill(ignored_n, 0).sum(), logits.new_zeros(())
    grad = log_q.exp()
    if teacher_nE is not None:
        if temperature != 1:
            log_q = logits.div_(temperature).log_softmax(-1)
        del logits
        log_p = teacher_head.logits(teacher_nE)
        log_p = (log_p if temperature == 1 else log_p.div_(temperature)).log_softmax(-1)
        p = log_p.exp()
        kl = temperature**2 * log_p.sub_(log_q).mul_(p).sum(-1).masked_fill(ignored_n, 0).sum()
        grad.add_(log_q.exp_().sub_(p), alpha=settings.kl_weight * temperature)
    grad.scatter_add_(-1, labels_n[:, None], -torch.ones_like(label_log_q))
    return torch.stack([cross_entropy, kl]), grad if slope is None else grad.mul_(slope)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _matmul_input(tensor: Tensor) -> Tensor:
    """Cast as autocast would, but once: autocast inside the loop would cast the head again for every chunk."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _matmul_head(head: Head) -> Head:
    return head._replace(weight=_matmul_input(head.weight))


def _chunks(length: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, length, chunk_tokens)]


def _check_settings(kl_weight: float, temperature: float, chunk_tokens: int, *, has_teacher: bool) -> None:
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight must be at least 0, not {kl_weight}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if kl_weight > 0 and not has_teacher:
        raise ValueError(f"kl_weight {kl_weight} needs teacher_NE; pass it, or set kl_weight to 0")


def _check_rows(name: str, hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    if hidden.shape != (len(labels), head.shape[1]) or labels.dim() != 1:
        raise ValueError(
            f"{name} must be (N, E) for labels (N,) and a head (V, E); got {tuple(hidden.shape)}, "
            f"{tuple(labels.shape)} and {tuple(head.shape)}: flatten batch and tokens first"
        )
    if hidden.dtype != head.dtype:
        raise ValueError(f"{name} is {hidden.dtype} and its head {head.dtype}: cast one, or use autocast")


def _check_vocabularies(head: Tensor, teacher_head: Tensor) -> None:
    if len(head) != len(teacher_head):
        raise ValueError(
            f"the student's head has {len(head)} tokens and the teacher's {len(teacher_head)}: "
            "distil between models that share a vocabulary"
        )
