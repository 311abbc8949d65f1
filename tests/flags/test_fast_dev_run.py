"""fast_dev_run runs everything and leaves nothing: no export, checkpoint, configuration, event or result."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from kvpress import KnormPress
from lightning.pytorch import LightningModule

import sparsekv_pl
from sparsekv_pl.blocksparse.collection import TensorCollection
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.measuring_module import MeasuringModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeCases, MakeTrainer
from train import TrainCommandLine

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


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
    own = yaml.safe_load(QUICKSTART.read_text())
    own["model"]["init_args"]["backbone"] |= {"pretrained": tiny_models["llama"], "dtype": "float32"}
    own["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "fast_dev_run": True, "accelerator": "cpu"}
    own.pop("name", None)  # default_root_dir says where
    own["trainer"]["callbacks"] += [
        {"class_path": "callbacks.anchor_analysis.AnchorAnalysisCallback"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -1}},
    ]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(own))
    TrainCommandLine(args=["fit", "--config", str(config), "--merge", "--trainer.precision", "32-true"])
    config.unlink()
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
