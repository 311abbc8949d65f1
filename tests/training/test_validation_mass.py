"""Validation measures how much of the teacher's attention each press keeps, and shows where it is missed."""

import math
from pathlib import Path

import pytest
import torch
from kvpress import BlockPress, ChunkKVPress, ChunkPress, KnormPress, SnapKVPress
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import EIT, SelectionObjective
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, mixed

RATIO = 0.7


def either() -> EvictionAugPress:
    return EvictionAugPress([KnormPress(), SnapKVPress(window_size=8)], score_all=True)


@pytest.mark.parametrize(
    "eviction", [RealEviction(either()), RealEviction(either(), budget=1000), RealEviction(KnormPress(), 40)]
)
def test_it_is_what_training_logs_at_the_same_ratio(
    eviction: Eviction, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    """Weighted over all batches: here each of them in turn, by the total mass of its heads."""
    module = EITModule(tiny_backbone(), eviction, mixed(), validation_compression_ratio=RATIO)
    data = tiny_data()
    logged = tiny_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)[0]
    loss = module.objective.selection_loss
    assert loss is not None
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for place, batch in enumerate(data.val_dataloader()):
            view, _ = module.student.view(batch, RATIO, place)
            for one in loss.kept_mass(loss.targets(view.selections)):
                parts = torch.stack([one.kept * one.weights, one.most * one.weights, one.weights])
                sums[one.press] = sums.get(one.press, 0) + parts.flatten(1).double().sum(1)
    assert len(sums) == 1 + isinstance(eviction.press, EvictionAugPress)
    for press, (kept, most, weights) in sums.items():
        assert logged[f"val/kept_mass/{press}"] == pytest.approx(float(kept / weights), rel=1e-5)
        assert logged[f"val/kept_mass_most/{press}"] == pytest.approx(float(most / weights), rel=1e-5)
        assert 0 < logged[f"val/kept_mass/{press}"] < logged[f"val/kept_mass_most/{press}"] < 1


def test_the_reached_share_is_drawn_by_layer_and_head_for_each_press(
    tmp_path: Path, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(either()), SelectionObjective(), optimizer=adamw)
    logger = TensorBoardLogger(tmp_path)
    trainer = tiny_trainer(
        Curriculum(Fixed(RATIO)), logger=logger, max_steps=2, limit_val_batches=1.0, val_check_interval=1
    )
    trainer.fit(module, tiny_data())
    logger.finalize("success")
    shown = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert set(shown.Tags()["images"]) == {"val/reached/Knorm", "val/reached/SnapKV"}
    assert [image.step for image in shown.Images("val/reached/Knorm")] == [1, 2]
    assert len(shown.Scalars("val/kept_mass/SnapKV")) == len(shown.Scalars("val/kept_mass_most/Knorm")) == 2


@pytest.mark.parametrize(
    ("validates", "why"),
    [
        (RealEviction(BlockPress(KnormPress(), 20)), "Block(Knorm) scores a context of 96 tokens by parts of 20"),
        (RealEviction(ChunkPress(KnormPress(), 20)), "Chunk(Knorm) scores a context of 96 tokens by parts of 20"),
        (
            RealEviction(ChunkKVPress(SnapKVPress(window_size=8)), 32),
            "ChunkKV(SnapKV) evicts from 3 chunks and",
        ),
    ],
)
def test_a_press_that_cannot_be_followed_validates_without_it_and_says_so_once(
    validates: Eviction,
    why: str,
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(KnormPress()), mixed(), adamw, validation_eviction=validates)
    data = tiny_data(batch_size=1)
    trainer = tiny_trainer(Curriculum(Fixed(RATIO)), max_steps=2, limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(module, data)
    assert math.isfinite(trainer.callback_metrics["val/perplexity_evicted"])
    again = tiny_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)[0]
    assert set(again) == {"val/perplexity_full", "val/perplexity_evicted"}
    [said] = [record.getMessage() for record in caplog.records if "validation does not measure" in record.getMessage()]
    assert why in said


@pytest.mark.parametrize("eviction", [RealEviction(KnormPress()), KVDropout()])
def test_an_objective_without_a_selection_loss_measures_none_and_runs_no_teacher(
    eviction: Eviction, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), eviction, EIT(), validation_eviction=RealEviction(KnormPress()))
    module.teacher = module.validation_student.teacher = None  # type: ignore[assignment]
    logged = tiny_trainer(limit_val_batches=1.0).validate(module, tiny_data(), verbose=False)[0]
    assert set(logged) == {"val/perplexity_full", "val/perplexity_evicted"}
