"""The dense loss that the chunked ones must equal, and inputs to compare them on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.head import Head


def dense_reference(
    student: Tensor,
    teacher: Tensor | None,
    head: Head | Tensor,
    labels: Tensor,
    kl_weight: float,
    temperature: float = 1.0,
    teacher_head: Head | Tensor | None = None,
) -> Tensor:
    """The formula of distillation_loss with all logits at once."""
    kept = labels != IGNORE
    logits = dense_logits(student[kept], head)
    loss = F.cross_entropy(logits, labels[kept])
    if teacher is None:
        return loss
    teacher_logits = dense_logits(teacher[kept], head if teacher_head is None else teacher_head).detach()
    kl = F.kl_div((logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1), reduction="sum")
    return loss + kl_weight * temperature**2 * kl / kept.sum()


def dense_logits(hidden: Tensor, head: Head | Tensor) -> Tensor:
    """Logits in the steps in which transformers' models compute them."""
    if isinstance(head, Tensor):
        return hidden @ head.T
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.cap is None else torch.tanh(logits / head.cap) * head.cap


def make_inputs(
    tokens: int,
    hidden: int,
    vocab: int,
    masked: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student (N, E), teacher (N, E), head (V, E) and labels (N,), of which a share is IGNORE and the first is not."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, tokens, hidden, generator=generator, dtype=dtype)
    head = torch.randn(vocab, hidden, generator=generator, dtype=dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    masked_rows = torch.rand(tokens, generator=generator) < masked
    masked_rows[0] = False
    return student, teacher, head, labels.masked_fill(masked_rows, IGNORE)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """d loss / d input, one per input."""
    return torch.autograd.grad(loss, inputs)
