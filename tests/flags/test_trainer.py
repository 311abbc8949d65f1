"""Every flag, logger and callback of Lightning's Trainer works, or is refused; fast_dev_run leaves nothing."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from kvpress import KnormPress
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.optim import AdamW

import sparsekv_pl
from sparsekv_pl.blocksparse.collection import TensorCollection
from sparsekv_pl.cli.saved_config import SaveRunConfig
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.measuring_module import MeasuringModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.training.eit_module import EITModule
from tests.flags.rows import CALLBACKS, FLAGS, Row
from tests.tiny_training import MakeBackbone, MakeCases, MakeData, MakeTrainer, trained
from train import TrainCommandLine

TABLE = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
FLAG_ROWS = {f"{flag}-{n}": row for flag, rows in FLAGS.items() for n, row in enumerate(rows)}
CALLBACK_ROWS = {f"{name}-{n}": row for name, rows in CALLBACKS.items() for n, row in enumerate(rows)}


class Validations(Callback):
    """Counts batches of validation."""

    def __init__(self) -> None:
        self.batches = 0

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches += not trainer.sanity_checking


@pytest.fixture
def happens(module: Callable[..., EITModule], tiny_data: MakeData, tiny_trainer: MakeTrainer) -> Callable[..., None]:
    """Trains two steps with a row's settings and compares with what the row says."""

    def check(row: Row, *made: Callable[[], Callback]) -> None:
        counted = Validations()

        def fit() -> Trainer:
            trainer = tiny_trainer(*(make() for make in made), counted, **({"max_steps": 2} | row.settings))
            trainer.fit(module(), tiny_data())
            return trainer

        if row.says:
            with pytest.raises((ValueError, MisconfigurationException, ImportError), match=row.says) as refused:
                fit()
            assert "\n" not in str(refused.value)
        else:
            assert (fit().global_step, counted.batches) == (row.steps, row.validations)

    return check


@pytest.mark.parametrize("row", FLAG_ROWS.values(), ids=FLAG_ROWS.keys())
def test_a_flag_works_or_is_refused(row: Row, happens: Callable[..., None]) -> None:
    happens(row)


@pytest.mark.parametrize(("make", "row"), CALLBACK_ROWS.values(), ids=CALLBACK_ROWS.keys())
def test_a_callback_works_or_is_refused(make: Callable[[], Callback], row: Row, happens: Callable[..., None]) -> None:
    happens(row, make)


@pytest.mark.parametrize(
    ("rows", "there"),
    [(FLAGS, set(inspect.signature(Trainer).parameters)), (CALLBACKS, set(pl.callbacks.__all__))],  # type: ignore[attr-defined]
    ids=["flags", "callbacks"],
)
def test_none_is_left_out_here_or_in_the_documentation(rows: dict[str, Any], there: set[str]) -> None:
    assert set(rows) == there
    assert not [name for name in there if f"| {name} |" not in TABLE]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_fused_optimizer_trains_as_a_plain_one(
    clip: float | None, module: Callable[..., EITModule], tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        found.append(module(optimizer=partial(AdamW, lr=1e-2, fused=fused)))
        tiny_trainer(max_steps=2, gradient_clip_val=clip).fit(found[-1], tiny_data())
    plain, fused_ = map(trained, found)
    assert plain.keys() == fused_.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused_[name], value, rtol=1e-4, atol=1e-6)


QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def train_quickstart(tiny_model: str, folder: Path, trainer: dict[str, Any], *arguments: str, **saving: Any) -> Any:
    """Train the tiny model as the quickstart does, but for these trainer settings and callbacks added to its own."""
    own = yaml.safe_load(QUICKSTART.read_text())
    own["model"]["init_args"]["backbone"] |= {"pretrained": tiny_model, "dtype": "float32"}
    callbacks = [*own["trainer"]["callbacks"][: trainer.pop("callbacks_kept", None)], *trainer.pop("callbacks")]
    own["trainer"] |= {"default_root_dir": str(folder / "run"), "accelerator": "cpu", "callbacks": callbacks} | trainer
    own.pop("name", None)  # default_root_dir says where
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(own))
    made = TrainCommandLine(args=["fit", "--config", str(config), *arguments], **saving)
    config.unlink()
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_leaves_a_finished_run_as_it_is(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    for name in ("final", "merged", "checkpoints"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "made.txt").write_text("by an earlier run")
    before = files(tmp_path)
    callbacks = [
        {"class_path": "callbacks.anchor_analysis.AnchorAnalysisCallback"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -1}},
    ]
    trainer = {"fast_dev_run": True, "callbacks": callbacks}
    train_quickstart(tiny_models["llama"], tmp_path, trainer, "--merge", "--trainer.precision", "32-true")
    assert files(tmp_path) == before
    assert "exported to" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["test", "predict"])
def test_evaluation_leaves_nothing(
    kind: str, tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    made: dict[str, Callable[[], LightningModule]] = {
        "test": lambda: EvaluationModule(tiny_backbone(), [Setting(KnormPress(), [0.5])], str(tmp_path / "out")),
        "predict": lambda: TensorCollection(tiny_backbone(), output=str(tmp_path / "out")),
    }
    module, data = made[kind](), tiny_cases()
    getattr(tiny_trainer(fast_dev_run=True, default_root_dir=tmp_path), kind)(module, data)
    assert not files(tmp_path)
    getattr(tiny_trainer(default_root_dir=tmp_path), kind)(module, data)  # the same object, in earnest
    assert files(tmp_path / "out")


def test_every_module_with_an_output_knows() -> None:
    for part in pkgutil.walk_packages(sparsekv_pl.__path__, "sparsekv_pl."):
        importlib.import_module(part.name)

    def below(kind: type) -> set[type]:
        return {kind, *(found for own in kind.__subclasses__() for found in below(own))}

    modules = {kind for kind in below(LightningModule) if kind.__module__.startswith("sparsekv_pl.")}
    writing = {kind for kind in modules if "output" in inspect.signature(kind).parameters}
    assert len(writing) >= 9
    assert all(issubclass(kind, MeasuringModule) for kind in writing)
    assert EITModule in modules - writing


SECRET = "hf_ThisIsNoTokenButLooksLikeOne42"


class Keeps(Logger):
    """As W&B's and without a folder: takes pictures by ``log_image``."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, float] = {}
        self.pictures: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    name = "keeps"
    version = "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # noqa: ARG002
        self.numbers |= metrics

    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        self.settings |= params

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:  # noqa: ARG002
        self.pictures[key] = images[0]


def test_training_gives_all_loggers_what_they_take(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}}
    trainer = {
        "precision": "32-true",
        "max_steps": 1,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "logger": [{"class_path": "tests.flags.test_trainer.Keeps"}, csv],
        "callbacks": [{"class_path": "callbacks.anchor_analysis.AnchorAnalysisCallback"}],
        "callbacks_kept": 1,
    }
    with pytest.warns(UserWarning, match="CSVLogger does not take the picture anchors/layers"):
        made = train_quickstart(tiny_models["llama"], tmp_path, trainer, save_config_callback=SaveRunConfig)
    keeps, written = made.trainer.loggers
    assert isinstance(keeps, Keeps)
    assert isinstance(written, CSVLogger)
    assert keeps.settings["model"]["init_args"]["backbone"]["pretrained"] == tiny_models["llama"]
    assert keeps.pictures["anchors/layers"].shape[2] == 3
    assert {"train/loss", "anchors/share_sinks"} <= set(keeps.numbers)
    assert "anchors/share_sinks" in (Path(written.log_dir) / "metrics.csv").read_text()
    assert "pretrained" in (Path(written.log_dir) / "hparams.yaml").read_text()
    assert "pretrained" in (tmp_path / "run" / "final" / "config.yaml").read_text()
    assert SECRET not in str(keeps.settings)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_evaluation_gives_all_loggers_numbers_and_pictures(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    loggers = Keeps(), Keeps()
    module = EvaluationModule(tiny_backbone(), [Setting(KnormPress(), [0.5])], str(tmp_path / "out"))
    tiny_trainer(logger=list(loggers)).test(module, tiny_cases())
    for keeps in loggers:
        assert "base_full_cache_0_dense/perplexity" in keeps.numbers
        assert keeps.pictures["report"].dtype == "uint8"
