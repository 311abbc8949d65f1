"""Training gates with a real Trainer on tiny models: loss, gradients, validation, resuming."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparsekv_pl.blocksparse.gate_distillation import GateDistillation, best_blocks, gate_loss
from sparsekv_pl.blocksparse.true_blocks import BlockAttention
from sparsekv_pl.models.batch import IGNORE, Batch
from sparsekv_pl.training.non_finite_guard import NonFiniteLossError
from tests.largest_tensor import Largest
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained

SIZE = 16


def distillation(backbone: Any, **settings: Any) -> GateDistillation:
    defaults: dict[str, Any] = {"block_size": SIZE, "gate_dim": 16, "optimizer": adamw}
    return GateDistillation(backbone, **(defaults | settings))


def batch(rows: int = 2, context: int = 48, continuation: int = 20, padding: int = 0) -> Batch:
    ids = torch.randint(2, 1024, (rows, context + continuation), generator=torch.Generator().manual_seed(3))
    if padding:
        ids[0, -padding:] = 1  # the tiny tokenizer's pad id
    return {
        "context_ids": ids[:, :context],
        "continuation_ids": ids[:, context:],
        "labels": torch.full((rows, continuation), IGNORE),
        "document_ids": ["a"] * rows,
        "tasks": ["text"] * rows,
    }


def sharpen(module: GateDistillation) -> None:
    """Random models attend to everything alike."""
    for layer in module.model.model.layers:
        layer.self_attn.scaling *= 8


def pooled(module: GateDistillation, ids: Tensor) -> Tensor:
    """(layers, B, H, N, N): the model's own attention weights, the largest of each pair of blocks."""
    module.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = module.model(ids, output_attentions=True).attentions
    module.model.set_attn_implementation("sdpa")
    count = -(-ids.shape[1] // SIZE)
    cut = [slice(i * SIZE, (i + 1) * SIZE) for i in range(count)]
    rows = [torch.stack([torch.stack(attentions)[..., r, c].amax((-1, -2)) for c in cut], -1) for r in cut]
    return torch.stack(rows, -2)


# --- the loss ---


def test_the_loss_is_the_kl_of_normalised_rows() -> None:
    peak = torch.tensor([[0.5, 0, 0], [0.3, 0.1, 0], [0.2, 0.1, 0.1]]).view(1, 1, 3, 3)
    scores = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]).view(1, 1, 3, 3)
    second = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    third = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert gate_loss(peak, scores.log()).item() == pytest.approx((0 + second + third) / 3)
    assert gate_loss(peak, (peak / peak.sum(-1, keepdim=True)).log()).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_target_is_the_models_own_attention_pooled(kind: str, tiny_backbone: MakeBackbone) -> None:
    module = distillation(tiny_backbone(kind))
    sharpen(module)
    given = batch()
    ids = torch.cat([given["context_ids"], given["continuation_ids"]], 1)
    peaks, scores = pooled(module, ids), []
    module._observe(given, lambda layer, q, k, _: scores.append(module.gates.gate(layer).log_scores(q, k)))
    expected = torch.stack([gate_loss(peak, score) for peak, score in zip(peaks, scores, strict=True)]).mean()
    torch.testing.assert_close(module.loss(given), expected, rtol=1e-4, atol=1e-5)


def test_padding_is_cut_off(tiny_backbone: MakeBackbone) -> None:
    module = distillation(tiny_backbone())
    assert module.tokenizer.pad_token_id == 1
    given = batch(padding=7)
    assert torch.equal(module._text(given)[:, :48], given["context_ids"])
    assert torch.equal(module._text(given)[:, 48:], given["continuation_ids"][:, :13])


# --- training ---


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_gates_learn_and_nothing_else_changes(
    kind: str, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = distillation(tiny_backbone(kind))
    generator = torch.Generator().manual_seed(0)
    for parameter in module.gates.parameters():
        parameter.data.normal_(generator=generator)  # a random model attends to all alike, as untrained gates do
    frozen = {name: value.clone() for name, value in module.model.state_dict().items()}
    assert set(trained(module)) == {f"gates.{name}" for name, _ in module.gates.named_parameters()}
    before = trained(module)
    first = float(module.loss(batch()))
    tiny_trainer(max_steps=14).fit(module, tiny_data())
    assert float(module.loss(batch())) < 0.7 * first
    assert all(torch.equal(value, frozen[name]) for name, value in module.model.state_dict().items())
    assert not any(torch.equal(value, before[name]) for name, value in trained(module).items())
    assert all(parameter.grad is None for parameter in module.model.parameters())


def test_it_trains_in_bfloat16(tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer) -> None:
    module = distillation(tiny_backbone(dtype="bfloat16"))
    trainer = tiny_trainer(precision="bf16-mixed", limit_val_batches=2, val_check_interval=2)
    trainer.fit(module, tiny_data())
    assert all(value.dtype == torch.float32 for value in trained(module).values())
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())


def test_the_gradient_keeps_blocks_and_no_tokens(tiny_backbone: MakeBackbone) -> None:
    """What is saved for backward is far smaller than the queries of one layer."""
    module, saved = distillation(tiny_backbone(), gate_dim=2), []
    given = batch(rows=1, context=492)

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.loss(given)
    assert saved
    assert max(saved) < 512 * 64 / 4


def test_no_tensor_grows_with_the_square_of_the_context(tiny_backbone: MakeBackbone) -> None:
    module, most = distillation(tiny_backbone()), []
    for context in (236, 492):
        with Largest() as largest:
            module.loss(batch(rows=1, context=context)).backward()
        most.append(largest.numbers)
    assert most[1] <= 2 * most[0]


# --- validation ---


def test_recall_and_mass_are_of_the_best_quarter() -> None:
    truth = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0)).tril()
    truth = truth / truth.sum(-1, keepdim=True)
    scores = truth.clone()
    attention = BlockAttention(mass=truth, peak=truth)
    perfect = {name: value.item() for name, value in best_blocks(attention, scores).items()}
    best = [truth[0, 0, row].sort(descending=True).values[: -(-(row + 1) // 4)].sum().item() for row in range(1, 9)]
    assert perfect["recall"] == 1
    assert perfect["mass"] == perfect["mass_best"] == pytest.approx(sum(best) / 8)
    scores[0, 0, 8] = -truth[0, 0, 8]  # of nine blocks three are taken: now the worst
    worse = {name: value.item() for name, value in best_blocks(attention, scores).items()}
    assert worse["recall"] == pytest.approx(7 / 8)
    worst = truth[0, 0, 8].sort().values[:3].sum().item()
    assert worse["mass"] == pytest.approx((sum(best[:7]) + worst) / 8)
    assert worse["mass_best"] == perfect["mass_best"]


def test_no_more_than_sixteen_blocks_count() -> None:
    truth = torch.ones(1, 1, 100, 100).tril() / torch.arange(1, 101)[:, None]
    expected = sum(min(16, -(-n // 4)) / n for n in range(2, 101)) / 99
    assert best_blocks(BlockAttention(truth, truth), truth)["mass"].item() == pytest.approx(expected)


def test_validation_logs_its_measures(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = distillation(tiny_backbone())
    data = tiny_data(validation_windows=2, validation_needles=0)
    metrics = tiny_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)[0]
    layers = {"val/loss_layer_00", "val/loss_layer_01"}
    assert set(metrics) == {"val/loss", "val/recall", "val/mass", "val/mass_best"} | layers
    assert metrics["val/loss"] == pytest.approx(sum(metrics[name] for name in layers) / 2)
    assert metrics["val/loss"] == pytest.approx(float(module.loss(next(iter(data.val_dataloader())))))
    assert 0 < metrics["val/mass"] <= metrics["val/mass_best"] <= 1


# --- stopping, going on, failing ---


def test_a_loss_that_is_not_finite_stops(tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer) -> None:
    module = distillation(tiny_backbone())
    module.gates.gate(1).query_weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"at step 0 .*documents: \['a', 'a'\]"):
        tiny_trainer().fit(module, DataLoader([batch()], batch_size=None))


@pytest.mark.parametrize(
    "settings, complaint",
    [({"context_tokens": 24}, "context_tokens=24 are fewer than two blocks of 16"), ({"context_tokens": 1020}, "1036")],
    ids=["too short", "more positions than the model has"],
)
def test_contexts_that_do_not_fit_are_refused(
    settings: dict[str, Any],
    complaint: str,
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny_trainer().fit(distillation(tiny_backbone()), tiny_data(**settings))
