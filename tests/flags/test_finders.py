"""Finding a batch size and a learning rate, and plateaus: they change what they are for, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import ConstantLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as WithoutMonitor

from callbacks.adapter_export import AdapterExport
from callbacks.curriculum import Curriculum
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeCases, MakeData, MakeTrainer, trained

MakeModule = Callable[..., EITModule]
MONITOR = "val/perplexity_evicted"


def test_the_batch_size_finder_leaves_a_run_as_with_that_size(
    module: MakeModule, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # of the adapter
    found, data = module(), tiny_data()
    callbacks = BatchSizeFinder(steps_per_trial=1, max_trials=2), AdapterExport(str(tmp_path)), Curriculum(Fixed(0.5))
    tiny_trainer(*callbacks, max_steps=2).fit(found, data)
    assert data.batch_size == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]
    torch.manual_seed(0)
    plain = module()
    tiny_trainer(Curriculum(Fixed(0.5)), max_steps=2).fit(plain, tiny_data(batch_size=4))
    assert all(torch.equal(value, trained(plain)[name]) for name, value in trained(found).items())


def test_the_learning_rate_finder_leaves_a_run_as_with_that_rate(
    module: MakeModule, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    tuned, seen = module(), []
    before = trained(tuned)
    ratio = Curriculum(Fixed(0.25))
    tuned.register_full_backward_hook(lambda *_: seen.append(tuned.compression_ratio))
    tuner = tiny_trainer(ratio, max_steps=2)
    search = Tuner(tuner).lr_find(tuned, datamodule=tiny_data(), num_training=14, min_lr=1e-5)
    assert search is not None
    assert tuned.lr == search.suggestion()
    assert tuned.compression_ratio == 0.25  # searched as it trains
    assert all(torch.equal(value, trained(tuned)[name]) for name, value in before.items())
    trainer = tiny_trainer(max_steps=2)
    trainer.fit(tuned, tiny_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == tuned.lr


def test_a_rate_that_a_schedule_would_overwrite_is_refused(
    module: MakeModule, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    scheduled = module(lr_scheduler=lambda optimizer: ConstantLR(optimizer))
    with pytest.raises(ValueError, match=r"LearningRateFinder finds a rate that model.lr_scheduler would overwrite"):
        tiny_trainer(LearningRateFinder(num_training_steps=2)).fit(scheduled, tiny_data())
    scheduled.lr = 0.1
    with pytest.raises(ValueError, match=r"learning rate 0.1 .* set lr_scheduler to null"):
        tiny_trainer().fit(scheduled, tiny_data())


def test_a_plateau_acts_after_each_validation(
    module: MakeModule, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    """No validation is better by 1e9, so each one after the first takes a tenth."""
    settings: dict[str, Any] = {"patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
    scheduled = module(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, MONITOR, **settings))
    trainer = tiny_trainer(max_steps=3, val_check_interval=2, limit_val_batches=1, accumulate_grad_batches=2)
    trainer.fit(scheduled, tiny_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("scheduler", "settings", "says"),
    [
        (WithoutMonitor, {}, "give lightning.pytorch.cli.ReduceLROnPlateau with a monitor"),
        (lambda o: ReduceLROnPlateau(o, MONITOR), {"limit_val_batches": 0}, f"waits for {MONITOR} of a validation"),
        (lambda o: ReduceLROnPlateau(o, MONITOR), {"val_check_interval": "00:00:00:01"}, "at known batches"),
        (
            lambda o: ReduceLROnPlateau(o, MONITOR),
            {"val_check_interval": 3, "accumulate_grad_batches": 2},
            "in the middle of an optimizer step of 2",
        ),
    ],
    ids=["torch's own", "no validation", "by time", "inside accumulation"],
)
def test_a_plateau_that_could_not_act_is_refused(
    scheduler: Any,
    settings: dict[str, Any],
    says: str,
    module: MakeModule,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
) -> None:
    trainer = tiny_trainer(**({"limit_val_batches": 1} | settings))
    with pytest.raises(ValueError, match=says):
        trainer.fit(module(lr_scheduler=scheduler), tiny_data())


def test_overfitting_repeats_the_first_batches(
    module: MakeModule, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Contexts(pl.Callback):
        def on_train_batch_start(self, *hook: Any) -> None:
            seen.append(hook[2]["context_ids"].tolist())

    seen: list[list[list[int]]] = []
    trainer = tiny_trainer(Contexts(), overfit_batches=2, max_epochs=-1)
    trainer.fit(module(), tiny_data())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    first, second, *again = seen
    assert first != second
    assert again == [first, second]
    with pytest.raises(ValueError, match="overfit_batches begins with the first batches again"):
        tiny_trainer(overfit_batches=2, max_epochs=-1).fit(
            module(), tiny_data(), ckpt_path=str(tmp_path / "saved.ckpt")
        )


def test_an_evaluation_refuses_to_look_for_a_batch_size(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    evaluation = EvaluationModule(tiny_backbone(), [], str(tmp_path))
    with pytest.raises(ValueError, match=r"BatchSizeFinder would measure cases twice; set data\.batch_size"):
        tiny_trainer(BatchSizeFinder()).test(evaluation, tiny_cases(), verbose=False)
