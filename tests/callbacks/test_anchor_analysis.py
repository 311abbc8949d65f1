"""The anchor analysis during training: it measures changes, logs to every logger, and does not change training."""

import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from kvpress import SnapKVPress
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typing_extensions import override

from callbacks.anchor_analysis import AnchorAnalysisCallback, per_token
from callbacks.curriculum import Curriculum
from sparsekv_pl.analysis.anchor_attention import observed
from sparsekv_pl.analysis.token_types import types_for
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.evaluation_mode import evaluating
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained


class Losses(pl.Callback):
    """Every batch's loss, and the state of the random generators after it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        drawn = hash((random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()))
        self.seen.append((float(outputs["loss"]), drawn))


@pytest.fixture
def module(tiny_backbone: MakeBackbone) -> EITModule:
    """With dropout, so that a lost mode or a drawn number would show in the losses."""
    torch.manual_seed(3)
    backbone = tiny_backbone(lora=Lora(r=4, dropout=0.2))
    return EITModule(backbone, RealEviction(SnapKVPress(window_size=8)), optimizer=adamw)


def fit(
    module: EITModule, data: Any, make_trainer: MakeTrainer, *callbacks: pl.Callback, **settings: Any
) -> tuple[pl.Trainer, list[Any]]:
    losses = Losses()
    trainer = make_trainer(Curriculum(Fixed(0.5)), *callbacks, losses, **settings)
    torch.manual_seed(5)
    trainer.fit(module, data)
    return trainer, losses.seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same_bit_for_bit(
    precision: str, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    results = []
    for callbacks in ([], [AnchorAnalysisCallback(every_n_steps=1)]):
        torch.manual_seed(3)
        backbone = tiny_backbone(lora=Lora(r=4, dropout=0.2))
        module = EITModule(backbone, RealEviction(SnapKVPress(window_size=8)), optimizer=adamw)
        settings = {"precision": precision, "val_check_interval": 2, "limit_val_batches": 1}
        _, losses = fit(module, tiny_data(), tiny_trainer, *callbacks, **settings)
        results.append((losses, trained(module), {name: part.training for name, part in module.named_modules()}))
    (losses, weights, modes), (with_losses, with_weights, with_modes) = results
    assert len(losses) == 4 and len({loss for loss, _ in losses}) == 4
    assert losses == with_losses and modes == with_modes
    assert all(torch.equal(weights[name], with_weights[name]) for name in weights)


def test_it_measures_at_the_start_every_n_steps_and_at_the_end(
    module: EITModule,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "board", "")]
    callback = AnchorAnalysisCallback(every_n_steps=2, rows=1)
    settings: dict[str, Any] = {"logger": loggers, "default_root_dir": tmp_path, "accumulate_grad_batches": 2}
    fit(module, tiny_data(), tiny_trainer, callback, max_steps=3, **settings)
    assert [found["step"] for found in callback.measured] == [0, 2, 3]

    board = TensorBoard(tmp_path / "board")
    wanted = {f"anchors/{name}" for name in callback.measured[0]["scalars"]}
    assert wanted >= {"anchors/share_sinks", "anchors/share_punctuation", "anchors/times_chance_stop_word"}
    assert wanted >= {"anchors/share_recent", "anchors/carrying_tokens", "anchors/per_token_content"}
    for name in wanted:
        logged = {event.step: event.value for event in board.events.Scalars(name)}
        assert logged == pytest.approx(
            {f["step"]: f["scalars"][name.removeprefix("anchors/")] for f in callback.measured}
        )
    assert [event.step for event in board.events.Images("anchors/layers")] == [0, 2, 3]
    histograms = board.events.Histograms("anchors/log10_attention_per_token")
    assert [event.step for event in histograms] == [0, 2, 3]
    assert histograms[0].histogram_value.num == 96  # one row
    assert histograms[0].histogram_value.max <= 0
    assert wanted <= set((tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(","))

    report = json.loads((tmp_path / "anchor_analysis.json").read_text())
    assert (report["before"]["step"], report["after"]["step"]) == (0, 3)
    assert report["probe"]["rows"] == 1 and report["probe"]["tokens"] == 96
    assert report["before"]["scalars"] != report["after"]["scalars"]
    assert [line["step"] for line in report["measured"]] == [0, 2, 3]
    assert (tmp_path / "anchor_analysis.png").stat().st_size > 0
    said = capsys.readouterr().out
    assert "before (step 0)" in said and "after (step 3)" in said and "share_punctuation" in said


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
        self.events.Reload()


def test_the_adapter_is_on_and_shares_are_what_a_full_matrix_says(
    module: EITModule, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    callback = AnchorAnalysisCallback(every_n_steps=100, sinks=2)
    fit(module, tiny_data(), tiny_trainer, callback)
    model = causal_lm(module.model).eval()
    ids = torch.tensor(callback.probe)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = torch.stack(model(ids, output_attentions=True).attentions).mean((0, 2))  # (B, S, S)
    scalars = callback.measured[-1]["scalars"]
    assert scalars["share_sinks"] == pytest.approx(float(attention[..., :2].sum() / attention.sum()), rel=1e-3)
    is_word = types_for(module.tokenizer).of(ids) == 3
    is_word[:, :2] = False
    on_words = (attention * is_word[:, None]).sum()
    assert scalars["share_content"] == pytest.approx(float(on_words / attention.sum()), rel=1e-3)
    seen = torch.arange(96, 0, -1)
    assert scalars["per_token_content"] == pytest.approx(float(on_words / (is_word * seen).sum()), rel=1e-3)
    with module.model.disable_adapter(), torch.no_grad():  # type: ignore[operator, union-attr]
        off = torch.stack(model(ids, output_attentions=True).attentions).mean((0, 2))
    assert scalars["share_sinks"] != pytest.approx(float(off[..., :2].sum() / off.sum()), rel=1e-3)


def test_a_resumed_run_keeps_its_probe_and_its_beginning(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def make() -> EITModule:
        return EITModule(tiny_backbone(), RealEviction(SnapKVPress(window_size=8)), optimizer=adamw)

    first, saver = AnchorAnalysisCallback(every_n_steps=2), ModelCheckpoint(tmp_path, save_last=True)
    settings: dict[str, Any] = {"max_epochs": -1, "enable_checkpointing": True}
    fit(make(), tiny_data(), tiny_trainer, first, saver, max_steps=2, **settings)
    second = AnchorAnalysisCallback(every_n_steps=2)
    trainer = tiny_trainer(Curriculum(Fixed(0.5)), second, max_steps=4, max_epochs=-1)
    trainer.fit(make(), tiny_data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert second.probe == first.probe
    assert [found["step"] for found in second.measured] == [0, 2, 4]
    assert second.measured[:2] == first.measured
    assert json.loads((Path(trainer.default_root_dir) / "anchor_analysis.json").read_text())["before"]["step"] == 0


def test_a_development_run_writes_nothing(
    module: EITModule, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = AnchorAnalysisCallback()
    fit(module, tiny_data(), tiny_trainer, callback, fast_dev_run=True, default_root_dir=tmp_path)
    assert len(callback.measured) == 2 and not list(tmp_path.glob("anchor_analysis*"))


def test_modes_come_back_as_they_were() -> None:
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    network[1].eval()
    with pytest.raises(RuntimeError), evaluating(network):
        assert not any(part.training for part in network.modules())
        raise RuntimeError
    assert [part.training for part in network.modules()] == [True, True, False, False]


def test_attention_per_token_is_per_query_that_sees_it(tiny_backbone: MakeBackbone) -> None:
    model, tokenizer = tiny_backbone(lora=None).load(trainable=False)
    ids = torch.randint(2, 1024, (2, 20), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = per_token(observed(model, ids, types_for(tokenizer).of(ids)))
        attention = torch.stack(model(ids, output_attentions=True).attentions).mean((0, 2))
    torch.testing.assert_close(found, attention.sum(1) / torch.arange(20, 0, -1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"rows": 0}, {"sinks": 17}, {"carrying": 0.0}])
def test_bad_settings_are_named(settings: dict[str, Any]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"AnchorAnalysisCallback.{name} is {value}: give"):
        AnchorAnalysisCallback(**settings)
