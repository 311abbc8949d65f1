"""Memory of the chunked losses: full logits never exist, nothing of size V is kept, no product is computed twice."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekv_pl.objectives.losses import distillation_loss
from tests.objectives.losses_reference import make_inputs


class LargestTensor(TorchDispatchMode):
    """Elements of the largest result of any operation, and the number of matrix products with the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        self.products += func is torch.ops.aten.mm.default
        return result


def test_full_logits_never_exist_and_no_product_is_made_twice() -> None:
    tokens, hidden, vocab, chunk = 64, 4, 1000, 16
    student, teacher, head, labels = make_inputs(tokens, hidden, vocab, masked=0.0)
    student.requires_grad_()
    with LargestTensor() as seen:
        distillation_loss(student, teacher, head, labels, kl_weight=1.0, chunk_tokens=chunk).loss.backward()
    assert seen.elements == chunk * vocab
    assert seen.products == 3 * tokens // chunk


def test_nothing_of_the_vocabulary_is_kept_for_backward() -> None:
    student, teacher, head, labels = make_inputs(64, 4, 1000, masked=0.0)
    student.requires_grad_()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        distillation_loss(student, teacher, head, labels, kl_weight=1.0, chunk_tokens=16)
    assert kept
    assert max(kept) == student.numel()


def test_without_gradients_no_gradient_is_computed() -> None:
    student, teacher, head, labels = make_inputs(32, 4, 100, masked=0.0)
    student.requires_grad_()
    head.requires_grad_()
    with torch.no_grad(), LargestTensor() as seen:
        loss = distillation_loss(student, teacher, head, labels, kl_weight=1.0, chunk_tokens=16).loss
    assert seen.products == 2 * 2
    assert not loss.requires_grad
