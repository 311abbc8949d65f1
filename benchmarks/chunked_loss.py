"""Chunked distillation loss against the dense one: memory and time of forward + backward, large vocabulary.

Run from the checkout: ``python benchmarks/chunked_loss.py``. Takes some minutes and 10 GiB.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import paired_times, peak_memory, report
from torch import Tensor

from sparsekv_pl.objectives.losses import distillation_loss

VOCABULARY, HIDDEN, TOKENS = 151_936, 1_024, 2_048
KL_WEIGHT = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dense_loss(student: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The loss from all logits at once, in float32 as in transformers' own loss."""
    student_logits = F.linear(student, head).float()
    with torch.no_grad():
        teacher_probabilities = F.linear(teacher, head).float().softmax(-1)
    cross_entropy = F.cross_entropy(student_logits, labels)
    kl = F.kl_div(student_logits.log_softmax(-1), teacher_probabilities, reduction="sum") / len(labels)
    return cross_entropy + KL_WEIGHT * kl


def chunked_loss(student: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return distillation_loss(student, teacher, head, labels, kl_weight=KL_WEIGHT).loss


def build_step(loss_name: str, dtype_name: str) -> Callable[[], None]:
    """Make inputs and return a step of one forward and backward. The head is frozen, as with LoRA."""
    loss = {"dense": dense_loss, "chunked": chunked_loss}[loss_name]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(TOKENS, HIDDEN, generator=generator)
    teacher = (student + 0.1 * torch.randn(TOKENS, HIDDEN, generator=generator)).to(DTYPES[dtype_name])
    student = student.to(DTYPES[dtype_name]).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.05).to(DTYPES[dtype_name])
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    def step() -> None:
        student.grad = None
        loss(student, teacher, head, labels).backward()

    return step


def main() -> None:
    rows: list[dict[str, str]] = []
    ratios: dict[str, float] = {}
    for dtype in DTYPES:
        chunked_bytes = peak_memory(__file__, "build_step", "chunked", dtype)
        dense_bytes = peak_memory(__file__, "build_step", "dense", dtype)
        time = paired_times(build_step("chunked", dtype), build_step("dense", dtype), rounds=3)
        ratios |= {f"memory_{dtype}": chunked_bytes / dense_bytes, f"time_{dtype}": time.median}
        rows.append(
            {
                "dtype": dtype,
                "chunked GiB": f"{chunked_bytes / 2**30:.2f}",
                "dense GiB": f"{dense_bytes / 2**30:.2f}",
                "memory ratio": f"{chunked_bytes / dense_bytes:.3f}",
                "time ratio (low to high)": f"{time.median:.3f} ({time.low:.3f} to {time.high:.3f})",
            }
        )
    goals = {name: 0.125 if name.startswith("memory") else 1.1 for name in ratios}
    report("chunked_loss", rows, ratios, floors={}, goals=goals)


if __name__ == "__main__":
    main()
