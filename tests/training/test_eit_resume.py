"""Training that stops and resumes, on tiny models: Ctrl-C, a checkpoint's content, a bad loss."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import ExpectedAttentionPress, SnapKVPress
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from callbacks.curriculum import Curriculum
from data.mixture import EvictionData
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Linear, Spread
from sparsekv_pl.training.eit_module import EITModule
from sparsekv_pl.training.non_finite_guard import NonFiniteLossError
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, mixed, trained


class At(Callback):
    """Calls ``action(module)`` when the batch of optimizer step ``step`` starts or ends."""

    def __init__(self, step: int, action: Callable[[Any], None], end: bool = False) -> None:
        self.step, self.action, self.end = step, action, end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self.end and trainer.global_step == self.step:
            self.action(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.end and trainer.global_step == self.step:
            self.action(pl_module)


class Run:
    """The same training every time it is made: data stream, curriculum, press draws, learning-rate schedule."""

    def __init__(self, backbone: Backbone, data: EvictionData, folder: Path, save_every: int) -> None:
        torch.manual_seed(0)
        press = EvictionAugPress([SnapKVPress(window_size=8), ExpectedAttentionPress()], score_all=True)
        self.module = EITModule(
            backbone,
            RealEviction(press),
            mixed(),
            optimizer=adamw,
            lr_scheduler=lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=5),
        )
        self.data = data
        self.checkpoint = ModelCheckpoint(
            folder, every_n_train_steps=save_every, save_top_k=-1, save_last=True, save_on_exception=True
        )
        self.curriculum = Curriculum(Spread(Linear(0.2, 0.7, steps=4)))

    def fit(self, make: MakeTrainer, *more: Callback, ckpt_path: Any = None, **settings: Any) -> dict[str, Tensor]:
        trainer = make(self.curriculum, self.checkpoint, *more, enable_checkpointing=True, **settings)
        trainer.fit(self.module, self.data, ckpt_path=ckpt_path)
        return trained(self.module)


@pytest.fixture
def new_run(tiny_backbone: MakeBackbone, tiny_data: MakeData, tmp_path: Path) -> Callable[..., Run]:
    def make(folder: str, save_every: int = 2, **settings: Any) -> Run:
        return Run(tiny_backbone(**settings), tiny_data(), tmp_path / folder, save_every)

    return make


@pytest.fixture
def sigint() -> Iterator[None]:
    """Lightning ignores the signal for good once it has handled it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.parametrize(
    "settings", [{}, {"lora": None}, {"lora": Lora(dropout=0.3)}], ids=["lora", "full", "lora with dropout"]
)
def test_a_resumed_run_ends_with_the_same_parameters(
    settings: dict[str, Any], new_run: Callable[..., Run], tiny_trainer: MakeTrainer
) -> None:
    straight = new_run("straight", **settings).fit(tiny_trainer)
    half = new_run("half", **settings)
    assert any(not torch.equal(value, straight[name]) for name, value in half.fit(tiny_trainer, max_steps=2).items())
    resumed = new_run("resumed", **settings)
    assert_equal(resumed.fit(tiny_trainer, ckpt_path=half.checkpoint.last_model_path), straight)
    assert resumed.module.global_step == 4


def test_a_finished_run_goes_on_when_it_is_given_more_steps(
    new_run: Callable[..., Run], tiny_trainer: MakeTrainer
) -> None:
    """Its only checkpoint was saved when training had ended: with max_epochs 1 its one epoch would count as done."""
    straight = new_run("straight").fit(tiny_trainer)
    new_run("finished", save_every=55).fit(tiny_trainer, max_steps=2, max_epochs=-1)
    extended = new_run("finished", save_every=55)
    assert_equal(extended.fit(tiny_trainer, ckpt_path="last", max_epochs=-1), straight)
    assert extended.module.global_step == 4


def press_ctrl_c(_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_in_the_middle_of_a_step_resumes_too(new_run: Callable[..., Run], tiny_trainer: MakeTrainer) -> None:
    """The interrupted batch is drawn again."""
    straight = new_run("straight").fit(tiny_trainer)
    with pytest.raises(SystemExit):
        new_run("stopped").fit(tiny_trainer, At(1, press_ctrl_c))
    resumed, steps = new_run("stopped"), []
    parameters = resumed.fit(
        tiny_trainer,
        *(At(step, lambda module: steps.append(module.global_step)) for step in range(4)),
        ckpt_path="last",
    )
    assert steps == [1, 2, 3]
    assert_equal(parameters, straight)


def test_a_checkpoint_holds_only_what_trains(new_run: Callable[..., Run], tiny_trainer: MakeTrainer) -> None:
    run = new_run("run")
    run.fit(tiny_trainer, max_steps=2)
    saved = torch.load(run.checkpoint.last_model_path, weights_only=True)
    assert set(saved["state_dict"]) == set(trained(run.module))
    assert all("lora" in name for name in saved["state_dict"])


# --- failures ---


def test_a_loss_that_is_not_finite_stops_with_step_documents_and_checkpoint(
    new_run: Callable[..., Run], tiny_trainer: MakeTrainer
) -> None:
    def spoil(module: Any) -> None:
        name = next(name for name in trained(module) if "lora_A" in name)
        module.get_parameter(name).data.fill_(float("inf"))

    run = new_run("run")
    with pytest.raises(NonFiniteLossError) as stopped:
        run.fit(tiny_trainer, At(2, spoil))
    message = str(stopped.value)
    assert "at step 2" in message
    assert "documents: ['pydoc/" in message
    checkpoint = message.split("Last good checkpoint: ")[1].split(". Try")[0]
    assert checkpoint.endswith(".ckpt")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(bool(value.isfinite().all()) for value in saved.values())
