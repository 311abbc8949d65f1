"""What only a GPU can show; ``benchmarks/gpu.py`` runs these. Elsewhere they are skipped."""

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine"),
]


def test_numbers_are_sent_to_the_gpu_and_not_waited_for() -> None:
    from sparsekv_pl.models.devices import sent

    values = torch.arange(4.0)
    assert torch.equal(sent(values, torch.device("cuda")).cpu(), values)


def test_flex_attention_and_gathered_columns_equal_the_dense_reference() -> None:
    from benchmarks.gpu_attention import dropout_against_reference

    figures = dropout_against_reference("cuda", 512, lambda *_: (0.0, 0.0))
    off = {name: value for name, value in figures.items() if "off by" in name}
    assert len(off) == 4
    assert all(value < 2e-2 for value in off.values()), off  # a GPU may multiply in TF32


def test_a_training_step_on_the_gpu_equals_the_one_on_the_cpu() -> None:
    from benchmarks.gpu_models import TINY, batch_of, random_model, student_of

    losses = []
    weights = random_model(TINY, "cpu").state_dict()
    for device in ("cpu", "cuda"):
        model = random_model(TINY, "cpu")
        model.load_state_dict(weights)
        student = student_of(model.to(device), "selection")
        terms = student.objective(student.view(batch_of(128, 96, device), 0.5, 0)[0])
        terms["loss"].backward()
        losses.append(float(terms["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
