"""A resumed run has this run's settings: applied where well defined, else refused by name."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from kvpress import SnapKVPress
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from safetensors.torch import load_file, save_file
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from callbacks.checkpoint import SafeCheckpoint
from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.objectives import LM
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, trained

DONE = 2
"""Optimizer steps of the run that is resumed."""


def adamw(lr: float = 1e-2, **settings: Any) -> Callable[[Any], Optimizer]:
    return lambda parameters: AdamW(parameters, lr=lr, **settings)


def one_cycle(steps: int) -> Callable[[Optimizer], LRScheduler]:
    return lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=steps)


def warm_then_cosine(steps: int) -> Callable[[Optimizer], LRScheduler]:
    return lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, total_iters=1), CosineAnnealingLR(optimizer, steps - 1)], milestones=[1]
    )


SCHEDULES: dict[str, Callable[[int], Callable[[Optimizer], LRScheduler]]] = {
    "one cycle": one_cycle,
    "cosine": lambda steps: lambda optimizer: CosineAnnealingLR(optimizer, steps),
    "sequential": warm_then_cosine,
}


@pytest.fixture
def fit(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> Callable[..., EITModule]:
    """Train to ``steps``, from the last checkpoint if ``resume``."""

    def run(
        steps: int,
        optimizer: Any = None,
        schedule: Any = None,
        resume: bool = False,
        lora: Lora | None = None,
        stopping: int = 3,
        curriculum: bool = True,
        precision: Any = "32-true",
        **backbone: Any,
    ) -> EITModule:
        torch.manual_seed(0)
        module = EITModule(
            tiny_backbone(lora=lora or Lora(r=4), **backbone),
            RealEviction(SnapKVPress(window_size=8)),
            LM(),
            optimizer=optimizer or adamw(),
            lr_scheduler=schedule,
        )
        callbacks = [
            *([Curriculum(Fixed(0.5))] if curriculum else []),
            ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1),
            EarlyStopping("val/perplexity_full", patience=stopping),
        ]
        trainer = tiny_trainer(
            *callbacks,
            max_steps=steps,
            max_epochs=-1,
            enable_checkpointing=True,
            limit_val_batches=1,
            precision=precision,
        )
        trainer.fit(module, tiny_data(), ckpt_path=str(tmp_path / "last.ckpt") if resume else None)
        return module

    return run


def plateau(monitor: str = "val/perplexity_evicted", **settings: Any) -> Callable[[Optimizer], ReduceLROnPlateau]:
    """No validation is better by 1e9 than the first: every second one after it lowers the rate."""
    return lambda optimizer: ReduceLROnPlateau(
        optimizer, monitor, patience=1, threshold=1e9, threshold_mode="abs", **settings
    )


@pytest.fixture
def follow(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> Callable[..., EITModule]:
    """Train to ``steps`` with a schedule, a validation and two batches to a step; a checkpoint every ``save`` steps."""

    def run(folder: str, steps: int, save: int, schedule: Any, resume: bool = False) -> EITModule:
        torch.manual_seed(0)
        module = EITModule(
            tiny_backbone(), RealEviction(SnapKVPress(window_size=8)), LM(), optimizer=adamw(), lr_scheduler=schedule
        )
        trainer = tiny_trainer(
            *(Curriculum(Fixed(0.5)), SafeCheckpoint(save, dirpath=str(tmp_path / folder))),
            max_steps=steps,
            max_epochs=-1,
            enable_checkpointing=True,
            limit_val_batches=1,
            accumulate_grad_batches=2,
            val_check_interval=4,
        )
        saved = sorted((tmp_path / folder).glob("*.ckpt"))[-1] if resume else None
        trainer.fit(module, tiny_data(batch_size=1), ckpt_path=saved)
        return module

    return run


def rate(module: EITModule) -> float:
    return module.trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_finished_run_goes_on_at_the_rate_of_a_longer_schedule(fit: Callable[..., EITModule], name: str) -> None:
    schedule = SCHEDULES[name]
    fit(DONE, schedule=schedule(DONE))
    extended = fit(2 * DONE, schedule=schedule(3 * DONE), resume=True)
    assert extended.global_step == 2 * DONE
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    expected = schedule(3 * DONE)(optimizer)
    for _ in range(2 * DONE):
        optimizer.step()
        expected.step()
    assert rate(extended) == pytest.approx(expected.get_last_lr()[0])
    assert rate(extended) > 1e-5


@pytest.mark.parametrize(
    ("saved", "every"),
    [(3, 3), (4, 4), (4, 100), (6, 6)],
    ids=["between validations", "after one, before the plateau", "after both", "after one that lowers the rate"],
)
def test_a_resumed_plateau_goes_on_as_an_uninterrupted_one(
    follow: Callable[..., EITModule], saved: int, every: int
) -> None:
    whole = follow("whole", 7, 100, plateau())
    assert rate(whole) == pytest.approx(1e-3)
    follow("parts", saved, every, plateau())
    resumed = follow("parts", 7, every, plateau(), resume=True)
    assert rate(resumed) == rate(whole)
    (one,), (other,) = ([c.scheduler for c in m.trainer.lr_scheduler_configs] for m in (whole, resumed))
    assert one.state_dict() == other.state_dict()
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(resumed)[name])


def test_a_plateaus_settings_are_this_runs_and_its_metric_is_the_checkpoints(follow: Callable[..., EITModule]) -> None:
    follow("run", 4, 4, plateau())
    with pytest.raises(ValueError, match=r"lr_scheduler.monitor is val/perplexity_full, and .* val/perplexity_evicted"):
        follow("run", 7, 4, plateau("val/perplexity_full"), resume=True)
    assert rate(follow("run", 7, 4, plateau(factor=0.5), resume=True)) == pytest.approx(5e-3)


def test_a_plateau_after_another_schedule_begins_at_this_runs_rate(follow: Callable[..., EITModule]) -> None:
    follow("run", 2, 2, one_cycle(2))
    assert rate(follow("run", 5, 2, plateau(), resume=True)) == pytest.approx(1e-2)


def test_settings_of_the_optimizer_and_of_callbacks_are_this_runs(
    fit: Callable[..., EITModule], caplog: pytest.LogCaptureFixture
) -> None:
    fit(DONE, adamw(weight_decay=0.1))
    module = fit(DONE + 1, adamw(1e-3, betas=(0.8, 0.9)), resume=True, stopping=7)
    group, state = module.trainer.optimizers[0].param_groups[0], module.trainer.optimizers[0].state
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.9), 1e-2)
    assert {int(moments["step"]) for moments in state.values()} == {DONE + 1}  # the moments went on
    assert "lr 0.01 -> 0.001" in caplog.text
    (stopping,) = (c for c in module.trainer.callbacks if isinstance(c, EarlyStopping))  # type: ignore[attr-defined]
    assert stopping.patience == 7


def test_another_precision_than_the_checkpoints_is_named(
    fit: Callable[..., EITModule], caplog: pytest.LogCaptureFixture
) -> None:
    fit(DONE)
    assert fit(DONE + 1, resume=True).global_step == DONE + 1
    assert "was trained in" not in caplog.text
    assert fit(DONE + 2, resume=True, precision="bf16-mixed").global_step == DONE + 2
    assert "the checkpoint was trained in 32-true, this run continues in bf16-mixed" in caplog.text


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optimizer": lambda parameters: SGD(parameters, lr=1e-2)}, "model.optimizer was AdamW, is SGD"),
        ({"lora": Lora(r=4, alpha=64)}, "model.backbone.lora.alpha was 32, is 64"),
        ({"lora": Lora(r=8)}, r"was \(4, 64\), is \(8, 64\)"),
        ({"lora": Lora(r=4, targets=("q_proj", "v_proj"))}, "is only in the checkpoint"),
        ({"lora": Lora(r=4, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"))}, "the checkpoint has none"),
        ({"steps": DONE - 1}, "trainer.max_steps is 1, but the checkpoint is of step 2"),
        ({"schedule": one_cycle(1)}, "model.lr_scheduler ends before step 2"),
    ],
)
def test_what_has_no_one_meaning_is_refused_by_name(
    fit: Callable[..., EITModule], changed: dict[str, Any], named: str
) -> None:
    fit(DONE)
    with pytest.raises(ValueError, match=named) as refused:
        fit(**{"steps": DONE + 1, "resume": True} | changed)
    assert "\n" not in str(refused.value)


def test_the_base_may_lie_elsewhere_but_not_be_another(
    fit: Callable[..., EITModule], tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    fit(DONE)
    elsewhere = tmp_path_factory.mktemp("base")
    copytree(tiny_models["llama"], elsewhere, dirs_exist_ok=True)
    assert fit(DONE + 1, resume=True, pretrained=str(elsewhere)).global_step == DONE + 1
    weights = load_file(elsewhere / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, elsewhere / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the base's weights \(model\.backbone\.pretrained\) was \w+, is \w+"):
        fit(DONE + 2, resume=True, pretrained=str(elsewhere))


def test_without_a_curriculum_nothing_is_trained_or_exported(fit: Callable[..., EITModule], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"add callbacks\.curriculum\.Curriculum"):
        fit(DONE, curriculum=False)
    assert not list(tmp_path.iterdir())
