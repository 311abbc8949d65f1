"""Training with one press, validating with another: configs/train/cross_transfer.yaml."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kvpress import BasePress, KnormPress, SnapKVPress
from transformers import DynamicCache, PreTrainedModel

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import IGNORE, Batch
from sparsekv_pl.objectives import LM
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw

RATIO = 0.6
WINDOW = 8


def loss_of(model: PreTrainedModel, press: BasePress, row: dict[str, Any]) -> tuple[float, int]:
    """Summed negative log-likelihood of a row's supervised tokens, read one by one after kvpress's own prefill."""
    context, continuation, labels = row["context_ids"], row["continuation_ids"], row["labels"]
    cache = DynamicCache()
    with press(model):
        model(context, past_key_values=cache)
    total, count = 0.0, 0
    for index in range(continuation.shape[1] - 1):
        position = torch.tensor([[context.shape[1] + index]])
        token = continuation[:, index : index + 1]
        logits = model(token, past_key_values=cache, position_ids=position).logits[0, -1]
        if labels[0, index + 1] != IGNORE:
            total += float(F.cross_entropy(logits, labels[0, index + 1]))
            count += 1
    return total, count


@torch.no_grad()
def perplexity(module: EITModule, batches: list[Batch], press: BasePress) -> float:
    """Compute the perplexity row by row, using nothing of this package but the weights."""
    press.compression_ratio = RATIO
    names = ("context_ids", "continuation_ids", "labels")
    rows = [
        {name: batch[name][row : row + 1] for name in names}  # type: ignore[literal-required]
        for batch in batches
        for row in range(len(batch["labels"]))
    ]
    totals, counts = zip(*(loss_of(causal_lm(module.model), press, row) for row in rows), strict=True)
    return math.exp(sum(totals) / sum(counts))


def test_validation_evicts_with_its_own_press_and_training_with_the_other(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    trains, validates = RealEviction(KnormPress()), RealEviction(SnapKVPress(window_size=WINDOW))
    module = EITModule(
        tiny_backbone(),
        trains,
        LM(),
        optimizer=adamw,
        validation_compression_ratio=RATIO,
        validation_eviction=validates,
    )
    data = tiny_data(validation_windows=2, validation_needles=1)
    trainer = tiny_trainer(Curriculum(Fixed(0.3)), max_steps=2, val_check_interval=2, limit_val_batches=1.0)
    trainer.fit(module, data)
    found = float(trainer.callback_metrics["val/perplexity_evicted"])
    module.eval()
    batches = list(data.val_dataloader())
    assert found == pytest.approx(perplexity(module, batches, SnapKVPress(window_size=WINDOW)), rel=1e-4)
    assert found != pytest.approx(perplexity(module, batches, KnormPress()), rel=1e-3)
    assert (trains.press.compression_ratio, validates.press.compression_ratio) == (0.3, RATIO)
    assert trainer.callback_metrics["train/kept_share"] == pytest.approx(0.7, abs=0.02)
    assert module.describe_training()["presses"] == ["Knorm"]
