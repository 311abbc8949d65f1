"""Losses and gradients that are not finite: the step is skipped or the run stops, and no weight changes."""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader
from typing_extensions import override

from sparsekv_pl.training.non_finite_guard import NonFinite, NonFiniteLossError, guards, watch
from sparsekv_pl.training.resumption import Resumption
from tests.processes import free_port
from tests.tiny_training import MakeTrainer

NAN = float("nan")
STEEP = "steep"
"""A batch with a finite loss and a gradient that is not."""
Value = float | str


class Line(pl.LightningModule):
    """Three weights times the batch's number, with Adam and weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.logged: list[float] = []

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        value = batch["value"]
        if value == STEEP:
            loss = (self.weight - self.weight.detach()).abs().sqrt().sum()
        else:
            loss = (self.weight * value).pow(2).sum()
        watch(self, {"loss": loss}, batch, compression_ratio=0.5)  # type: ignore[arg-type]
        return loss

    def configure_callbacks(self) -> list[pl.Callback]:
        return [guard for guard in guards(self.trainer) if not isinstance(guard, Resumption)]  # there is no backbone

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name == "train/skipped_steps":
            self.logged.append(value)
        super().log(name, value, *args, **kwargs)


def batches(values: Sequence[Value]) -> DataLoader[Any]:
    rows: Any = [{"value": value, "document_ids": [f"doc{i}"]} for i, value in enumerate(values)]
    return DataLoader(rows, batch_size=None)


def fit(make: MakeTrainer, values: Sequence[Value], *callbacks: pl.Callback, **settings: Any) -> tuple[Line, Any]:
    """The module and its optimizer's state after one pass over ``values``."""
    module = Line()
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = make(*callbacks, max_steps=-1, **settings)
    trainer.fit(module, batches(values), ckpt_path=ckpt_path)
    return module, trainer.optimizers[0].state_dict()["state"].get(0, {})


@pytest.mark.parametrize("bad", [NAN, float("inf"), STEEP])
@pytest.mark.parametrize(
    ("accumulate", "good", "spoilt"),
    [
        (1, [1.0, 2.0], [1.0, "bad", 2.0]),
        (2, [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, "bad", 5.0, 3.0, 4.0]),
        (2, [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 5.0, "bad", 3.0, 4.0]),
    ],
    ids=["alone", "first of two", "last of two"],
)
def test_a_skipped_step_leaves_no_trace_in_weights_and_optimizer(
    bad: Value, accumulate: int, good: list[Value], spoilt: list[Value], tiny_trainer: MakeTrainer
) -> None:
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    expected, state = fit(tiny_trainer, good, **settings)
    guard = NonFinite(skip=1)
    module, skipped = fit(tiny_trainer, [bad if v == "bad" else v for v in spoilt], guard, **settings)
    assert torch.equal(module.weight, expected.weight)
    assert all(torch.equal(skipped[name], state[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
    assert state["step"] == 2
    assert module.logged == [0, 1, 1]
    assert (guard.skipped, guard.in_a_row) == (1, 0)


@pytest.mark.parametrize(("bad", "says"), [(NAN, "the loss is nan"), (STEEP, "the gradient norm is ")])
def test_the_first_stops_by_default(bad: Value, says: str, tiny_trainer: MakeTrainer) -> None:
    module = Line()
    trainer = tiny_trainer(max_steps=-1)
    with pytest.raises(NonFiniteLossError, match=rf"at step 1 {says}.*compression_ratio: 0.5; documents: \['doc1'\]"):
        trainer.fit(module, batches([1.0, bad, 1.0]))
    assert module.weight.isfinite().all()
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 1


def test_the_limit_is_of_steps_in_a_row(tiny_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sparsekv_pl.training.non_finite_guard"):
        module, _ = fit(tiny_trainer, [NAN, NAN, 1.0, NAN, NAN], NonFinite(skip=2))
    assert module.logged == [1, 2, 2, 3, 4]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert said[3].startswith("Skipped optimizer step 4 (2 in a row, 4 in all): the loss is nan (terms: {'loss': nan}")
    assert "doc4" in said[3]
    with pytest.raises(NonFiniteLossError, match=r"at step 3 .* 2 steps in a row .*NonFinite.skip=2"):
        fit(tiny_trainer, [1.0, NAN, NAN, NAN], NonFinite(skip=2))


def test_the_counts_are_in_the_checkpoint(tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tiny_trainer, [NAN, 1.0, NAN], NonFinite(skip=1), saver, enable_checkpointing=True)
    resumed = {"max_epochs": 2, "ckpt_path": tmp_path / "step=3.ckpt"}
    with pytest.raises(NonFiniteLossError, match=r"at step 3 .* 1 steps in a row"):
        fit(tiny_trainer, [NAN] * 4, NonFinite(skip=1), **resumed)
    with pytest.raises(NonFiniteLossError, match=r"at step 3 .* 1 steps in a row .*NonFinite.skip=0"):
        fit(tiny_trainer, [NAN] * 4, NonFinite(skip=0), **resumed)  # a lower limit than the count
    guard = NonFinite(skip=1)
    fit(tiny_trainer, [1.0] * 4, guard, **resumed)
    assert (guard.skipped, guard.in_a_row) == (2, 0)


def scaled(factor: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=factor))


def test_overflow_of_scaled_gradients_is_the_scalers_business(tiny_trainer: MakeTrainer) -> None:
    """1e18 squared is 1e36: times 2, 3 and a factor of 16 or more it overflows float32, unscaled it does not."""
    plugin = scaled(2.0**7)
    guard = NonFinite()
    module, state = fit(tiny_trainer, [1e18] * 6, guard, plugins=[plugin])
    assert guard.skipped == 0
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 2**7
    assert 0 < state["step"] < 6
    assert module.weight.isfinite().all()


@pytest.mark.parametrize(("factor", "bad"), [(2.0**7, NAN), (0.5, STEEP)])
def test_a_scaler_does_not_hide_what_it_cannot_mend(factor: float, bad: Value, tiny_trainer: MakeTrainer) -> None:
    guard = NonFinite(skip=1)
    module, state = fit(tiny_trainer, [1.0, bad, 1.0], guard, plugins=[scaled(factor)])
    assert guard.skipped == 1
    assert state["step"] == 2
    assert module.weight.isfinite().all()


class SpoilsOneRank(pl.Callback):
    """The second batch of rank 1 is not a number."""

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            batch["value"] = NAN


def spoilt_rank(rank: int, port: int, folder: Path) -> None:
    """Train as one of two ranks; write the weights and the count of skipped steps."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    guard, module = NonFinite(skip=1), Line()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=2))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: dict[str, Any] = {"max_steps": 2, "accelerator": "cpu", "devices": 2, "accumulate_grad_batches": 2}
    trainer = pl.Trainer(callbacks=[guard, SpoilsOneRank()], strategy=strategy, **settings, **quiet)
    trainer.fit(module, batches([1.0] * 8))
    torch.save({"weight": module.weight.detach(), "skipped": guard.skipped}, folder / f"{rank}.pt")


def test_all_ranks_skip_together(tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    """The bad batch is the second of two accumulated ones, so the other rank would wait for its gradients."""
    alone, _ = fit(tiny_trainer, [1.0, 1.0], accumulate_grad_batches=2)
    start_processes(spoilt_rank, (free_port(), tmp_path), nprocs=2, start_method="forkserver")
    for rank in range(2):
        kept = torch.load(tmp_path / f"{rank}.pt")
        assert kept["skipped"] == 1
        assert torch.equal(kept["weight"], alone.weight)


def test_a_negative_limit_is_named() -> None:
    with pytest.raises(ValueError, match=r"NonFinite\.skip=-1: give 0 or more"):
        NonFinite(skip=-1)
